#!/usr/bin/env bash
# Iterative PIPA: sample, annotate, train, evaluate, and again from the model that came out. One table over the rounds.
#   bash scripts/iterative.sh [--fast] [--rounds NUMBER] [--prior previous|first] [--annotate words|rule|rollout]
#     [--start MODEL] [--seed NUMBER] [--work FOLDER]
# Starts from the model that scripts/quickstart.sh fine-tuned, unless --start names another. Run again, it goes on where
# it stopped, also with more rounds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

prior=previous by=words
own_flags="--prior, --annotate, "
own_flag() {
  case "$1" in
    --prior) prior=$2 ;;
    --annotate) by=$2 ;;
    *) return 1 ;;
  esac
}
source scripts/loop.sh
read_flags "$@"
check_loop
case "$prior" in
  previous | first) ;;
  *) echo "error: --prior $prior is not previous or first" >&2; exit 1 ;;
esac
# Words are the quickstart's: compared with the worked answer. Of the others a step is a line.
case "$by" in
  words) separator="" ;;
  rule | rollout) separator=$'\n' ;;
  *) echo "error: --annotate $by is not words, rule or rollout" >&2; exit 1 ;;
esac
work=${work:-runs/iterative$short-$prior-$by-seed$seed}

source scripts/stages.sh
set_prompt

# annotate ROUND MODEL ANSWERS OUTPUT
annotate() {
  case "$by" in
    words) stage "$work" "annotate_$1" python -m recipes.word_problems.label_steps --by word --answers "$3" \
      --problems "$work/problems_$1/sample.jsonl" --output "$4" ;;
    rule) stage "$work" "annotate_$1" python -m pipa_openrlhf.cli.annotate --annotate.method rule \
      --annotate.input "$3" --annotate.output "$4" ;;
    rollout) stage "$work" "annotate_$1" python -m pipa_openrlhf.cli.annotate --annotate.method rollout \
      --annotate.input "$3" --annotate.output "$4" --model.model_name_or_path "$2" "${prompt[@]}" \
      --rollout.temperature 1 --rollout.max_new_tokens 24 --train.seed "$seed" ;;
  esac
}

make_test
evaluate round_0 "$start"
evaluations=("round 0=$work/evaluate_round_0") runs=() current=$start
for ((round = 1; round <= rounds; round++)); do
  out=$work/round_$round
  # Of a prior that is not named the model is its own: the one that the round starts from.
  if [ "$prior" = first ]; then against=(--prior.model_name_or_path "$start"); else against=(); fi
  make_prompts "$round"
  sample "$round" "$current" "$work/sampled_$round.jsonl"
  annotate "$round" "$current" "$work/sampled_$round.jsonl" "$work/steps_$round.jsonl"
  train "round_$round" train_pipa "$current" --pipa.variant m --data.dataset "$work/steps_$round.jsonl" \
    --data.annotation step --data.step_separator "$separator" --pipa.sft_coef 1 --value.lr 2e-3 ${against[@]+"${against[@]}"}
  evaluate "round_$round" "$out"
  evaluations+=("round $round=$work/evaluate_round_$round") runs+=("round $round=$out") current=$out
done

report "Iterative PIPA-M, prior: $prior" "round 0"
