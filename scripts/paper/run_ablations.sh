#!/usr/bin/env bash
# Tables 2 to 4 and Figure 5, which are of DeepSeek alone; their other rows are those of Table 1. Flags as run_table1.sh.
paper=$(realpath "$(dirname "$0")")
rows=("$paper"/table1/{unpaired_step_pipa_m,unpaired_step_pipa_n,unpaired_answer_kto,paired_answer_pipa_m}.sh
  "$paper"/ablations/*.sh) models=(deepseek) rates=("")
source "$paper/runner.sh"
