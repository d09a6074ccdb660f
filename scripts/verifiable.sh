#!/usr/bin/env bash
# Learning from answers that can be checked, in rounds: DPO-VP's loop (arXiv 2503.12854), which keeps one pair of right
# and wrong of the eight answers to a problem, beside PIPA-M on all eight. Same prompts, same number of answers.
#   bash scripts/verifiable.sh [--fast] [--rounds NUMBER] [--start MODEL] [--seed NUMBER] [--work FOLDER]
# Starts from the model that scripts/quickstart.sh fine-tuned, unless --start names another. Run again, it goes on where
# it stopped. scripts/paper/verifiable.sh is the same at 7B.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

own_flags=""
own_flag() { return 1; }
source scripts/loop.sh
read_flags "$@"
check_loop
work=${work:-runs/verifiable$short-seed$seed}

source scripts/stages.sh
set_prompt

make_test
evaluate start "$start"
evaluations=("start=$work/evaluate_start") runs=()
for ((round = 1; round <= rounds; round++)); do
  make_prompts "$round"
  for arm in dpo pipa; do
    name=${arm}_$round
    # Both arms begin with the answers of the model that both start from.
    if [ "$round" = 1 ]; then from=$start of=1; else from=$work/${arm}_$((round - 1)) of=$name; fi
    sampled=$work/sampled_$of.jsonl
    sample "$of" "$from" "$sampled"
    if [ $arm = dpo ]; then
      stage "$work" "pairs_$round" python -m recipes.one_pair --answers "$sampled" --output "$work/pairs_$round.jsonl"
      # A pair is two answers.
      train "$name" train_dpo "$from" --data.dataset "$work/pairs_$round.jsonl" \
        --train.batch_size $((batch / 2)) --train.micro_batch_size $((batch / 2))
    else
      train "$name" train_pipa "$from" --pipa.variant m --data.dataset "$sampled" --value.lr 2e-3
    fi
    evaluate "$name" "$work/$name"
    evaluations+=("${arm^^} round $round=$work/evaluate_$name") runs+=("${arm^^} round $round=$work/$name")
  done
done

report "One pair a problem (DPO) and all answers (PIPA-M)" start
python scripts/verifiable_curves.py --work "$work" --tokenizer "$start"
