#!/usr/bin/env bash
# Table 1 on one node: SFT, every row on both models, its evaluation; then results/table1.md in the work folder.
#   bash scripts/paper/run_table1.sh [--model deepseek|qwen] [--work FOLDER] [--dry_run] [--toy FOLDER]
# Run again, it skips what is done.
paper=$(realpath "$(dirname "$0")")
rows=("$paper"/table1/*.sh) models=(deepseek qwen) rates=("")
source "$paper/runner.sh"
