# Sourced by run_*.sh, which set paper (this folder), rows, models and rates: every row on every model at every rate, then the tables.
set -euo pipefail

dry_run=false commands_only=false work=runs/paper toy="" passed=()
while [ $# -gt 0 ]; do
  case "$1" in
    --dry_run) dry_run=true ;;
    --commands_only) commands_only=true ;;
    --model) models=("${2:?--model is deepseek or qwen}"); shift ;;
    --work) work=${2:?--work needs a folder}; shift ;;
    --toy) toy=${2:?--toy needs a folder}; passed+=(--toy "$toy"); shift ;;
    *) echo "error: unknown argument $1 (use --model, --work, --dry_run or --toy)" >&2; exit 1 ;;
  esac
  shift
done
passed+=(--work "$work")
if [ -n "$toy" ]; then work=$work/toy; fi

# run_all [MORE FLAGS]: a row that fails does not keep the others from running; without SFT there are none.
failed=()
run_all() {
  local model row rate
  for model in "${models[@]}"; do
    bash "$paper/sft.sh" --model "$model" "${passed[@]}" "$@" || { failed+=("sft.sh of $model"); continue; }
    for row in "${rows[@]}"; do
      for rate in "${rates[@]}"; do
        bash "$row" --model "$model" ${rate:+--lr "$rate"} "${passed[@]}" "$@" || failed+=("$(basename "$row")")
      done
    done
  done
  [ ${#failed[@]} -eq 0 ]
}

if $commands_only; then run_all --commands_only; exit; fi
cd "$paper/../.."
if [ -x .venv/bin/python ]; then export PATH="$PWD/.venv/bin:$PATH"; fi
if $dry_run; then run_all --commands_only | python scripts/paper/plan.py; exit; fi
run_all || true
python scripts/paper/tables.py --work "$work"
if [ ${#failed[@]} -gt 0 ]; then echo "error: failed, see above: ${failed[*]}" >&2; exit 1; fi
