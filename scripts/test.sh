#!/usr/bin/env bash
# Set up .venv and run every check: style, types, then all tests, two at a time.
# Arguments go to pytest instead (`-m "not slow"`, a file, -k).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
mypy
if [ $# -gt 0 ]; then
  python -m pytest "$@"
else
  # By files, so that what a module of tests sets up once is set up once.
  python -m pytest -m "not slow" -n 2 --dist loadfile
  python -m pytest -m slow -n 2 --dist loadfile
fi
