#!/usr/bin/env bash
# Do the newest transformers, DeepSpeed and PEFT still work with OpenRLHF and with us? Run by hand; nothing depends on it.
#   bash scripts/test_newest.sh [REQUIREMENT...]      # such as transformers==5.16.0, where the newest does not import
# CPU only. Makes .venv-newest, beside .venv and without touching it, and upgrades it when run again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

newest=(transformers deepspeed peft "$@")
# What a change of theirs breaks first: losses and gradients of whole runs, layouts, LoRA, MoE, checkpoints, exports.
chosen=(
  test_first_loss test_baseline_first_loss test_gradient_sums test_invariance test_output_head test_shared_prefixes
  test_self_check test_loading test_adapters test_moe_balancing test_resume test_damaged_checkpoints test_loss_scale
  test_export
)
files=()
for name in "${chosen[@]}"; do
  found=$(find tests -name "$name.py")
  [ -n "$found" ] || { echo "error: tests has no $name.py: correct the list in scripts/test_newest.sh" >&2; exit 1; }
  files+=("$found")
done

[ -x .venv-newest/bin/python ] || "${PYTHON:-python3}" -m venv .venv-newest
export PATH="$PWD/.venv-newest/bin:$PATH" PYTHONPATH="$PWD" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" HF_HUB_OFFLINE=1
pip() { python -m pip --disable-pip-version-check "$@"; }

echo "== install"
pip install -q --upgrade "setuptools>=77" wheel packaging ninja
torch=$(grep '^torch==' scripts/openrlhf_runtime.txt)
python -c 'import torch, sys; sys.exit(torch.__version__.split("+")[0] != sys.argv[1])' "${torch#torch==}" 2>/dev/null \
  || pip install -q "$torch" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"}
# Our own pins and OpenRLHF's are what is in question: neither package brings its requirements.
DS_BUILD_OPS=0 pip install -q --upgrade --no-build-isolation "${newest[@]}" "$torch"
{ cat scripts/openrlhf_runtime.txt; sed -nE '/^dependencies = /,/^\]/s/^ +"(.*)",$/\1/p' pyproject.toml; } \
  | sed -E 's/^(transformers|deepspeed)==.*/\1/' > .venv-newest/requirements.txt
pip install -q -r .venv-newest/requirements.txt "${newest[@]}" pyarrow gguf pytest pytest-xdist hypothesis
pip install -q --no-deps openrlhf==0.11.2

echo "== versions"
versions=$(pip list --format=freeze | grep -E '^(torch|transformers|deepspeed|peft|accelerate|openrlhf)==')
echo "$versions"

echo "== import"
if ! python -c "import pipa_openrlhf.distributed.upstream"; then
  echo "error: OpenRLHF does not import with these; name an older one: bash scripts/test_newest.sh transformers==VERSION" >&2
  exit 1
fi

echo "== tests"
status=0
python -m pytest -q -m "not slow" -n 2 --dist loadfile -rfE "${files[@]}" || status=$?

echo "== summary"
if [ $status = 0 ]; then echo "passes with:"; else echo "fails (the tests are named above) with:"; fi
echo "$versions"
exit $status
