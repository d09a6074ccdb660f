#!/usr/bin/env bash
# Table 1, unpaired data, labels of answers: PIPA-N.
source "$(dirname "$0")/../settings.sh"
align "$name" unpaired answer pipa_n
