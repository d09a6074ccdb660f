#!/usr/bin/env bash
# Table 1, paired data, labels of answers: DPO.
source "$(dirname "$0")/../settings.sh"
align "$name" paired answer dpo
