#!/usr/bin/env bash
# Table 1, paired data, labels of answers: PIPA-M.
source "$(dirname "$0")/../settings.sh"
align "$name" paired answer pipa_m
