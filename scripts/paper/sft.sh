#!/usr/bin/env bash
# The SFT stage, from which every other script starts, and its evaluation.
source "$(dirname "$0")/settings.sh"
run_sft
evaluate sft
