#!/usr/bin/env bash
# The miniature study: Table 1 of the paper on a small model that learns chains of sums. docs/study.md
#   bash scripts/study.sh [--smoke] [--part PART] [--workers NUMBER] [--work FOLDER] [--sizes.NAME VALUE...]
# Run again, it goes on where it stopped. --part runs an ablation on the models and answers of the table.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

smoke=() work="" workers=2 more=()
while [ $# -gt 0 ]; do
  case "$1" in
    --smoke) smoke=(--smoke) ;;
    --work) work=${2:?--work needs a folder}; shift ;;
    --workers) workers=${2:?--workers needs a number}; shift ;;
    --part | --sizes.* | [!-]*) more+=("$1") ;;
    *) echo "error: unknown argument $1 (use --smoke, --part, --workers, --work or --sizes.NAME)" >&2; exit 1 ;;
  esac
  shift
done
if [ ${#smoke[@]} -gt 0 ]; then work=${work:-runs/study-smoke}; else work=${work:-runs/study}; fi

source scripts/environment.sh
# One thread a worker: two processes of several threads each wait for each other.
export OMP_NUM_THREADS=1
python -m recipes.arithmetic_study.study --work "$work" --workers "$workers" ${smoke[@]+"${smoke[@]}"} ${more[@]+"${more[@]}"}
