#!/usr/bin/env bash
# The tests that need a GPU, then the tables of benchmarks/gpu.py: under ten minutes on one H100, without a network.
# Arguments go to benchmarks/gpu.py; `--small` runs all of it on a CPU, to see that it runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
status=0
timeout 150 python3 -m pytest -q -rs tests/gpu || status=$?
python3 benchmarks/gpu.py "$@"
exit "$status"
