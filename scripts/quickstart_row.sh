#!/usr/bin/env bash
# A row of the quickstart's table: the training of its model, where quickstart.sh has not trained it, and its evaluation.
# Called by quickstart.sh:  bash scripts/quickstart_row.sh WORK SEED ROW
# Two rows that quickstart.sh leaves out tell what labels of words are worth: step_kto has them, pipa_n_answer has not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$1 seed=$2 row=$3
stage_log=$work/logs/$row.log
mkdir -p "$work/logs"
source scripts/stages.sh > /dev/null
source scripts/quickstart_commands.sh

# Every method starts from the model after SFT on its own right answers, and has an SFT term of weight 1 and a learning
# rate that was chosen on another seed.
start=$work/own_right folder=$work/$row own=()
answers=(--data.dataset "$work/answers.jsonl")
words=(--data.dataset "$work/words.jsonl" --data.annotation step --data.step_separator "")
batch=(--train.batch_size 64 --train.micro_batch_size 64)
method=("${lora[@]}" --prior.cache_dir "$work/prior_cache" --train.max_epochs 2)
kto=("${method[@]}" "${batch[@]}" --kto.sft_coef 1 --adam.lr 1e-4)
pipa=("${method[@]}" "${batch[@]}" --pipa.sft_coef 1 --adam.lr 2e-4 --value.lr 2e-3)

case "$row" in
  base)
    # It does not know the form of the answers: it is shown two of them before each problem.
    folder=$model
    shots=$'Omar has 11 sweets. Then he buys 6 more. How many sweets are there now?\n11 + 6 = 17\n#### 17\n\n'
    shots+=$'Lena has 3 boxes of 5 dates. She loses 4 of them. How many dates does Lena have now?\n'
    shots+=$'3 * 5 = 15\n15 - 4 = 11\n#### 11\n\n'
    own=(--data.input_template "$shots$template") ;;
  sft | own_right) ;;
  more_sft)
    # At least as many steps on the right answers as PIPA takes on all of them.
    all=$(wc -l < "$work/words.jsonl")
    right=$(grep -c '"answer_label": true' "$work/words.jsonl") || { echo "error: no answer is right" >&2; exit 1; }
    train more_sft train_sft "$start" "${answers[@]}" "${lora[@]}" "${batch[@]}" \
      --train.max_epochs $(((2 * all + right - 1) / right)) --adam.lr 2e-4 ;;
  dpo)
    # It takes pairs: each right answer with a wrong one to the same problem.
    train dpo train_dpo "$start" "${answers[@]}" --data.pairing match "${method[@]}" --train.batch_size 32 \
      --train.micro_batch_size 32 --model.nll_loss_coef 1 --adam.lr 5e-5 ;;
  kto) train kto train_kto "$start" "${answers[@]}" "${kto[@]}" ;;
  step_kto) train step_kto train_kto "$start" "${words[@]}" "${kto[@]}" ;;
  pipa_m) train pipa_m train_pipa "$start" --pipa.variant m "${words[@]}" "${pipa[@]}" ;;
  pipa_n) train pipa_n train_pipa "$start" --pipa.variant n "${words[@]}" "${pipa[@]}" ;;
  pipa_n_answer) train pipa_n_answer train_pipa "$start" --pipa.variant n "${answers[@]}" "${pipa[@]}" ;;
  *) echo "error: no row is called $row" >&2; exit 1 ;;
esac
evaluate "$row" "$folder" ${own[@]+"${own[@]}"}
