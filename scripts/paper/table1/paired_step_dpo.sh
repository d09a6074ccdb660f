#!/usr/bin/env bash
# Table 1, paired data, labels of steps: Step-DPO.
source "$(dirname "$0")/../settings.sh"
align "$name" paired step step_dpo
