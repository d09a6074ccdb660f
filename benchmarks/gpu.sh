#!/usr/bin/env bash
# The benchmarks on one CUDA device, bf16; results go to benchmarks/results/gpu/.
# Not run on a GPU so far: this project claims nothing about CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "gpu.sh needs a CUDA device" >&2; exit 1; }

results=benchmarks/results/gpu
mkdir -p "$results"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

python benchmarks/train_step.py --quick --shape 1b --output "$results/train_step.json" | tee "$results/train_step.txt"
python benchmarks/limit.py --quick --shape 1b --output "$results/limit.json" | tee "$results/limit.txt"
python benchmarks/scaling.py --quick --output "$results/scaling.json" | tee "$results/scaling.txt"
python benchmarks/memory_7b.py --quick --output "$results/memory_7b.json" | tee "$results/memory_7b.txt"
