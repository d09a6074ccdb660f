#!/usr/bin/env bash
# Table 1, paired data, labels of answers: PIPA-N.
source "$(dirname "$0")/../settings.sh"
align "$name" paired answer pipa_n
