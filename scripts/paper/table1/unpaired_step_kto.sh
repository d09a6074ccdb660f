#!/usr/bin/env bash
# Table 1, unpaired data, labels of steps: Step-KTO.
source "$(dirname "$0")/../settings.sh"
align "$name" unpaired step step_kto
