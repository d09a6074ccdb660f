#!/usr/bin/env bash
# Set up .venv and run every check: style, types, and all tests, two at a time, beginning with the longest.
# Arguments go to pytest instead (`-m "not slow"`, a file, -k).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/install.sh
# The tests of the sandbox and of the report's page need programs that only root can install.
for wanted in "bwrap: bubblewrap libseccomp2" "chromium: chromium"; do
  program=${wanted%%:*} packages=${wanted#*: }
  if ! command -v "$program" >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
      # shellcheck disable=SC2086
      { apt-get update && apt-get install -y --no-install-recommends $packages; } >/dev/null 2>&1 || true
    fi
    command -v "$program" >/dev/null || echo "Without $program (apt-get install $packages) its tests are skipped"
  fi
done
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
if [ $# -gt 0 ]; then
  mypy
  python -m pytest "$@"
else
  # Types beside the tests: the first mypy takes more than a minute of one core.
  mypy & types=$!
  # By files, so that what a module of tests sets up once is set up once, and in the order that tests/conftest.py wants.
  python -m pytest -n 2 --dist loadfile --no-loadscope-reorder && tests=0 || tests=$?
  wait "$types" || { echo "error: mypy found mistakes, see above" >&2; exit 1; }
  exit "$tests"
fi
