#!/usr/bin/env bash
# Table 2: PIPA-M without a value model, g = 0.5.
source "$(dirname "$0")/../settings.sh"
align "$name" unpaired step pipa_m --pipa.fixed_value 0.5
