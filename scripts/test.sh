#!/usr/bin/env bash
# Set up .venv and run every check: style, types, then all tests, two at a time.
# Arguments go to pytest instead (`-m "not slow"`, a file, -k).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
# The tests of the sandbox need a program that only root can install.
if ! command -v bwrap >/dev/null; then
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends bubblewrap libseccomp2; } >/dev/null 2>&1 || true
  fi
  command -v bwrap >/dev/null || echo "Without bubblewrap (apt-get install bubblewrap) the tests of the sandbox are skipped"
fi
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
