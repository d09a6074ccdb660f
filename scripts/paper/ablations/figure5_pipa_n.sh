#!/usr/bin/env bash
# Figure 5: the threshold from which a step of a wrong answer is right; 0.5 is the row of Table 1.
source "$(dirname "$0")/../settings.sh"
for threshold in -0.5 0 0.25 0.75 1; do
  align "${name}_threshold$threshold" unpaired step pipa_n --data.step_threshold=$threshold
done
