#!/usr/bin/env bash
# Table 1, unpaired data, labels of steps: PIPA-N.
source "$(dirname "$0")/../settings.sh"
align "$name" unpaired step pipa_n
