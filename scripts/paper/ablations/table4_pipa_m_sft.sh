#!/usr/bin/env bash
# Table 4: PIPA-M with the SFT term, on the data of its row there: paired.
source "$(dirname "$0")/../settings.sh"
align "$name" paired answer pipa_m --pipa.sft_coef 1.0
