#!/usr/bin/env bash
# scripts/verifiable.sh at 7B, on GSM8K's training problems: rounds of eight samples a problem, from the model after SFT.
# One pair a problem and DPO, beside PIPA-M on all eight. ROUNDS (3) and PROMPTS (7473) come from the environment.
source "$(dirname "$0")/settings.sh"
rounds=${ROUNDS:-3} prompts=${PROMPTS:-7473}
own=(--data.format auto --data.input_template $'<question> {} </question>\n' --train.max_epochs 1)

# draw NAME MODEL: eight graded answers to each training problem.
draw() {
  in_stage "$folder" "sampled_$1" python -m pipa_openrlhf.cli.sample --model.model_name_or_path "$2" \
    --problems.file "$gsm8k" --problems.split train --problems.max "$prompts" --prompt.style alphamath \
    --sample.num_answers 8 --sample.temperature 1 --sample.max_new_tokens 1024 --ds.param_dtype bf16 \
    --sample.output "$folder/sampled_$1.jsonl" ${toy:+--problems.max 2 --sample.max_new_tokens 8 --ds.param_dtype fp32}
}

# learn NAME MODULE START RATE DATA BATCH [MORE FLAGS]
learn() {
  local run=$1 module=$2 from=$3 rate=$4 data=$5 size=$6
  shift 6
  in_stage "$folder" "$run" "${launch[@]}" "pipa_openrlhf.cli.$module" --model.model_name_or_path "$from" "${shared[@]}" \
    "${own[@]}" --data.dataset "$data" --train.batch_size "$size" --adam.lr "$rate" \
    --prior.cache_dir "$work/prior_cache" "$@" --ckpt.output_dir "$folder/$run" ${toy_train[@]+"${toy_train[@]}"}
  evaluate "$run"
}

run_sft
evaluate sft
for ((round = 1; round <= rounds; round++)); do
  for arm in dpo pipa; do
    run=verifiable_${arm}_$round
    # Both arms begin with the answers of the model that both start from.
    if [ "$round" = 1 ]; then from=$sft of=verifiable_1; else from=$folder/verifiable_${arm}_$((round - 1)) of=$run; fi
    draw "$of" "$from"
    sampled=$folder/sampled_$of.jsonl pairs=$folder/pairs_$round.jsonl
    if [ $arm = dpo ]; then
      in_stage "$folder" "pairs_$round" python -m recipes.one_pair --answers "$sampled" --output "$pairs"
      # A pair is two answers.
      learn "$run" train_dpo "$from" 5e-7 "$pairs" $((batch / 2)) --model.beta 0.1
    else
      learn "$run" train_pipa "$from" "${lr:-$best_lr}" "$sampled" "$batch" --pipa.variant m
    fi
  done
done
