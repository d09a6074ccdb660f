#!/usr/bin/env bash
# Every objective on the answers that scripts/quickstart.sh sampled: train, evaluate, one table of held-out accuracy.
#   bash scripts/compare_objectives.sh [--fast] [--work FOLDER] [--lr RATE]
# Run the quickstart first, with the same --fast and --work. Run again, it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fast=false work="" rate=2e-4
while [ $# -gt 0 ]; do
  case "$1" in
    --fast) fast=true ;;
    --work) work=${2:?--work needs a folder}; shift ;;
    --lr) rate=${2:?--lr needs a learning rate}; shift ;;
    *) echo "error: unknown argument $1 (use --fast, --work FOLDER or --lr RATE)" >&2; exit 1 ;;
  esac
  shift
done
if $fast; then
  work=${work:-runs/quickstart-fast-seed0} epochs=3 batch=16
else
  work=${work:-runs/quickstart-seed0} epochs=2 batch=64
fi
for needed in label_steps evaluate_own_right; do
  if [ ! -e "$work/done/$needed" ]; then
    echo "error: $work has no finished quickstart: run bash scripts/quickstart.sh with the same --fast and --work" >&2
    exit 1
  fi
done

source scripts/stages.sh
out=$work/compare_from_own_right_lr$rate

# name | module | annotation | flags of its own
objectives=(
  "PIPA-M|train_pipa|answer|--pipa.variant m"
  "PIPA-M|train_pipa|step|--pipa.variant m"
  "PIPA-N|train_pipa|answer|--pipa.variant n"
  "PIPA-N|train_pipa|step|--pipa.variant n"
  "DPO|train_dpo|answer|"
  "IPO|train_dpo|answer|--model.ipo_enable"
  "Step-DPO-l1|train_dpo|step|--dpo.step_loss l1"
  "Step-DPO-l0|train_dpo|step|--dpo.step_loss l0"
  "KTO|train_kto|answer|"
  "Step-KTO-l1|train_kto|step|--kto.step_loss l1"
  "Step-KTO-per_step|train_kto|step|--kto.step_loss per_step"
)
prompt=(--data.input_template $'{}\n' --ds.param_dtype "$dtype")
evaluations=("SFT on its own right answers=$work/evaluate_own_right") runs=()

for row in "${objectives[@]}"; do
  IFS='|' read -r name module annotation own <<< "$row"
  run=$out/${name}_$annotation
  # All train on the same answers: each right one matched with a wrong one; PIPA and KTO take the pairs apart.
  # A pair is two answers, so that a step sees as many answers whatever the objective.
  if [ "$module" = train_dpo ]; then size=$((batch / 2)); else size=$batch; fi
  read -ra own_flags <<< "$own"
  stage "$out" "train_${name}_$annotation" "${launch[@]}" "pipa_openrlhf.cli.$module" --data.annotation "$annotation" \
    ${own_flags[@]+"${own_flags[@]}"} --data.pairing match --data.dataset "$work/answers.jsonl" \
    --model.model_name_or_path "$work/own_right" "${prompt[@]}" --ds.lora.rank 64 --ds.lora.alpha 64 \
    --train.batch_size $size --train.micro_batch_size $size --train.max_epochs $epochs --adam.lr "$rate" \
    --prior.cache_dir "$work/prior_cache" --ckpt.output_dir "$run" --ckpt.load_enable --ckpt.save_steps 40
  stage "$out" "evaluate_${name}_$annotation" python -m pipa_openrlhf.cli.evaluate --model.model_name_or_path "$run" \
    --problems.file "$work/problems/test.jsonl" --evaluate.output_dir "${run}_evaluation" \
    "${prompt[@]}" --evaluate.max_new_tokens 24
  evaluations+=("$name ($annotation)=${run}_evaluation") runs+=("$name ($annotation)=$run")
done

commands_of "$out" > "$out/commands.txt"
echo "== report"
python -m pipa_openrlhf.cli.report --report.title "Every objective on the same answers, learning rate $rate" \
  --report.evaluations "${evaluations[@]}" --report.baseline "SFT on its own right answers" --report.runs "${runs[@]}" \
  --report.commands "$out/commands.txt" --report.output "$out/report.html"
