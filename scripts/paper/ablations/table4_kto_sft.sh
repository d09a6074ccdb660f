#!/usr/bin/env bash
# Table 4: KTO with the SFT term, on the data of its row there: unpaired.
source "$(dirname "$0")/../settings.sh"
align "$name" unpaired answer kto --kto.sft_coef 1.0
