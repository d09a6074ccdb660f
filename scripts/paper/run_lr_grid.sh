#!/usr/bin/env bash
# The grid of learning rates that the paper chose each row's from: three runs a row. Flags as run_table1.sh.
paper=$(realpath "$(dirname "$0")")
rows=("$paper"/table1/*.sh) models=(deepseek qwen) rates=(5e-7 5e-6 5e-5)
source "$paper/runner.sh"
