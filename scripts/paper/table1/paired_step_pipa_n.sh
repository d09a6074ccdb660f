#!/usr/bin/env bash
# Table 1, paired data, labels of steps: PIPA-N.
source "$(dirname "$0")/../settings.sh"
align "$name" paired step pipa_n
