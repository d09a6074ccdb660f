#!/usr/bin/env bash
# Table 3: PIPA-M(T), whose prior was trained on all samples.
# From the SFT model, as the table's caption says; PRIOR_START=released: from the released model, as the text says.
source "$(dirname "$0")/../settings.sh"
run_sft
start=$sft prior=prior_all
if [ "${PRIOR_START:-sft}" = released ]; then start=$base prior=${prior}_released name=${name}_released; fi
fine_tune "$prior" "$start" all
align "$name" unpaired step pipa_m --prior.model_name_or_path "$folder/$prior"
