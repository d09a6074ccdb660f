#!/usr/bin/env bash
# Set up .venv and run every check: style, then all tests. Arguments go to pytest (`-m "not slow"` for the quick ones).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
python -m pytest "$@"
