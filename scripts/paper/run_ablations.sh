#!/usr/bin/env bash
# Tables 2 to 4 and Figure 5, which are of DeepSeek alone; their other rows are those of Table 1. Flags as run_table1.sh.
rows=("$(dirname "$0")"/table1/{unpaired_step_pipa_m,unpaired_step_pipa_n,unpaired_answer_kto,paired_answer_pipa_m}.sh
  "$(dirname "$0")"/ablations/*.sh) models=(deepseek) rates=("")
source "$(dirname "$0")/runner.sh"
