#!/usr/bin/env bash
# Table 1, unpaired data, labels of answers: KTO.
source "$(dirname "$0")/../settings.sh"
align "$name" unpaired answer kto
