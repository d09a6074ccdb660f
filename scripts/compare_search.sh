#!/usr/bin/env bash
# Does the value head help? Greedy decoding, votes and step-level beam search on the quickstart's test problems.
#   bash scripts/compare_search.sh [--fast] [--work FOLDER] [--problems NUMBER] [--grid]
# Run the quickstart first, with the same --fast and --work. Run again, it goes on where it stopped.
# --grid adds AlphaMath's published grid, (1,5) (2,5) (3,5) (5,5) beside the vote of five answers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=false work="" problems=200 grid=false
while [ $# -gt 0 ]; do
  case "$1" in
    --fast) fast=true ;;
    --work) work=${2:?--work needs a folder}; shift ;;
    --problems) problems=${2:?--problems needs a number}; shift ;;
    --grid) grid=true ;;
    *) echo "error: unknown argument $1 (use --fast, --work FOLDER, --problems NUMBER or --grid)" >&2; exit 1 ;;
  esac
  shift
done
if $fast; then work=${work:-runs/quickstart-fast-seed0}; else work=${work:-runs/quickstart-seed0}; fi
for needed in label_steps own_right; do
  if [ ! -e "$work/done/$needed" ]; then
    echo "error: $work has no finished quickstart: run bash scripts/quickstart.sh with the same --fast and --work" >&2
    exit 1
  fi
done

source scripts/stages.sh
out=$work/compare_search_$problems model=$work/pipa_n_lines
prompt=(--data.input_template $'{}\n' --ds.param_dtype "$dtype")

# The quickstart's PIPA-N has labels up to the first wrong word and none after it. Search asks what a whole line is worth,
# so this one is trained on labels of lines, where all that follows a wrong one is wrong.
stage "$work" pipa_n_lines "${launch[@]}" pipa_openrlhf.cli.train_pipa --model.model_name_or_path "$work/own_right" \
  --pipa.variant n --data.dataset "$work/answers.jsonl" --data.annotation step --data.step_separator $'\n' "${prompt[@]}" \
  --ds.lora.rank 64 --ds.lora.alpha 64 --train.batch_size 64 --train.micro_batch_size 64 --train.max_epochs 2 \
  --pipa.sft_coef 1 --adam.lr 2e-4 --value.lr 2e-3 --prior.cache_dir "$work/prior_cache" \
  --ckpt.output_dir "$model" --ckpt.load_enable --ckpt.save_steps 40 --ckpt.max_num 1

evaluations=()
# decode NAME FLAGS...: one way to answer the first test problems.
decode() {
  local name=$1 folder=$out/${1//[ (),]/_}
  shift
  stage "$out" "${folder##*/}" python -m pipa_openrlhf.cli.evaluate --model.model_name_or_path "$model" \
    --problems.file "$work/problems/test.jsonl" --problems.max "$problems" --evaluate.output_dir "$folder" \
    "${prompt[@]}" --evaluate.max_new_tokens 24 "$@"
  evaluations+=("$name=$folder")
}

decode greedy
votes=(8) searches=("3 1" "3 2" "5 4")
if $fast; then searches=("3 2"); fi
if $grid; then votes+=(5) searches+=("1 5" "2 5" "3 5" "5 5"); fi
for number in "${votes[@]}"; do
  decode "maj@$number" --evaluate.decode sample --evaluate.num_answers "$number" --evaluate.temperature 0.6 \
    --evaluate.value_head "$model"
done
for search in "${searches[@]}"; do
  read -r beams samples <<< "$search"
  for value in head logprob none; do
    decode "SBS ($beams,$samples) $value" --evaluate.decode sbs --sbs.beams "$beams" --sbs.samples "$samples" \
      --sbs.value "$value"
  done
done

commands_of "$out" > "$out/commands.txt"
echo "== report"
python -m pipa_openrlhf.cli.report --report.title "Decoding with and without the value head" \
  --report.evaluations "${evaluations[@]}" --report.baseline greedy --report.commands "$out/commands.txt" \
  --report.output "$out/report.html"
grep -h '^# ' "$out"/done/*
