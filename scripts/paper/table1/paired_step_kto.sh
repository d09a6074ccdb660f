#!/usr/bin/env bash
# Table 1, paired data, labels of steps: Step-KTO.
source "$(dirname "$0")/../settings.sh"
align "$name" paired step step_kto
