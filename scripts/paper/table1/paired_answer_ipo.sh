#!/usr/bin/env bash
# Table 1, paired data, labels of answers: IPO.
source "$(dirname "$0")/../settings.sh"
align "$name" paired answer ipo
