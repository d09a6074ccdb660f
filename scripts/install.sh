#!/usr/bin/env bash
# Make .venv with everything the package needs. Picks CPU or CUDA by itself.
#   bash scripts/install.sh [--cpu | --cuda]
# Running it again changes nothing that is already right.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

target=""
for argument in "$@"; do
  case "$argument" in
    --cpu) target=cpu ;;
    --cuda) target=cuda ;;
    *) echo "error: unknown argument $argument (use --cpu or --cuda)" >&2; exit 1 ;;
  esac
done
if [ -z "$target" ]; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then target=cuda; else target=cpu; fi
fi

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
  || { echo "error: Python 3.10 or newer is needed, $python is $("$python" -V 2>&1)" >&2; exit 1; }
[ -x .venv/bin/python ] || "$python" -m venv .venv \
  || { echo "error: cannot make .venv; on Debian install python3-venv" >&2; exit 1; }

stamp=".venv/.installed-$target"
wanted=$(cat pyproject.toml constraints.txt scripts/openrlhf_runtime.txt scripts/install.sh | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then echo "Already installed for $target in .venv"; exit 0; fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
echo "Installing for $target into .venv"
pip install -q --upgrade "setuptools>=77" wheel packaging ninja
if [ "$target" = cpu ]; then
  constraints=(-c constraints.txt)
  # The exact version keeps pip from fetching a CUDA build where a CPU wheel of it is offered. An index of torch alone
  # has old copies of the rest: the constraints come after it.
  .venv/bin/python -c 'import torch, sys; sys.exit(not torch.__version__.startswith("2.13.0"))' 2>/dev/null \
    || pip install -q torch==2.13.0 ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
  # By itself, because its build imports torch.
  DS_BUILD_OPS=0 pip install -q --no-build-isolation "${constraints[@]}" deepspeed==0.19.6
  # OpenRLHF without flash-attn, bitsandbytes and vllm.
  pip install -q "${constraints[@]}" -r scripts/openrlhf_runtime.txt
  pip install -q --no-deps openrlhf==0.11.2
else
  # OpenRLHF's own pins decide, and the torch that flash-attn is built against.
  constraints=()
  pip install -q torch
  pip install -q --no-build-isolation flash-attn==2.8.3
  pip install -q openrlhf==0.11.2
fi
pip install -q --no-build-isolation ${constraints[@]+"${constraints[@]}"} -e ".[dev,docs,quickstart,ray,judge]"

.venv/bin/python -c "import pipa_openrlhf.distributed.upstream" >/dev/null \
  || { echo "error: the installed package does not import; delete .venv and run again" >&2; exit 1; }
echo "$wanted" > "$stamp"
echo "Installed. Activate with: source .venv/bin/activate"
