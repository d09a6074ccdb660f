#!/usr/bin/env bash
# The miniature study: Table 1 of the paper on a model of a million parameters that learns chains of sums. docs/study.md
#   bash scripts/study.sh [--smoke] [--part PART] [--seeds NUMBER] [--workers NUMBER] [--work FOLDER]
# Run again, it goes on where it stopped. --part runs an ablation on the models and answers of the table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

smoke=() work="" workers=2 more=()
while [ $# -gt 0 ]; do
  case "$1" in
    --smoke) smoke=(--smoke) ;;
    --work) work=${2:?--work needs a folder}; shift ;;
    --workers) workers=${2:?--workers needs a number}; shift ;;
    --part | --seeds) more+=("$1" "${2:?$1 needs a value}"); shift ;;
    *) echo "error: unknown argument $1 (use --smoke, --part, --seeds, --workers or --work)" >&2; exit 1 ;;
  esac
  shift
done
if [ ${#smoke[@]} -gt 0 ]; then work=${work:-runs/study-smoke}; else work=${work:-runs/study}; fi

source scripts/stages.sh
# One thread a worker: two processes of several threads each wait for each other.
export OMP_NUM_THREADS=1
python -m recipes.arithmetic_study.study --work "$work" --workers "$workers" ${smoke[@]+"${smoke[@]}"} ${more[@]+"${more[@]}"}
