#!/usr/bin/env bash
# PIPA-M on two CPU workers of a Ray cluster, twice: undisturbed, and with one of them killed on purpose. Both must end
# with the same adapter. The data are the quickstart's, which its short form makes where they are not there yet.
#   bash scripts/ray/quickstart_ray.sh [--job] [--work FOLDER]
# --job: by `ray job submit`, against a head that is started here and ended afterwards.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

as_job=false work=runs/quickstart-fast-seed0
while [ $# -gt 0 ]; do
  case "$1" in
    --job) as_job=true ;;
    --work) work=${2:?--work needs a folder}; shift ;;
    *) echo "error: unknown argument $1 (use --job or --work FOLDER)" >&2; exit 1 ;;
  esac
  shift
done

[ -e "$work/words.jsonl" ] && [ -e "$work/own_right/args.json" ] || bash scripts/quickstart.sh --fast --work "$work"
source scripts/stages.sh
work=$(realpath "$work")  # a job runs in a folder of its own
out=$work/ray
rm -rf "$out"
mkdir -p "$out"
export OMP_NUM_THREADS=1

cluster=()
if $as_job; then
  port=$((20000 + RANDOM % 20000))
  ray start --head --block --disable-usage-stats --num-cpus 2 --object-store-memory 200000000 \
    --port "$port" --dashboard-port "$((port + 1))" > "$out/head.log" 2>&1 &
  head=$!
  trap 'kill $head 2>/dev/null; wait $head || true' EXIT
  address=http://127.0.0.1:$((port + 1))
  echo "== waiting for the head at $address"
  until ray job list --address "$address" > /dev/null 2>&1; do
    kill -0 $head || { cat "$out/head.log"; exit 1; }
    sleep 2
  done
  cluster=(ray job submit --address "$address" --working-dir . --)
fi

# pipa_m NAME: eight steps or so, a checkpoint after each.
pipa_m() {
  local address=()
  $as_job || address=(--ray.address local)
  exec ${cluster[@]+"${cluster[@]}"} python -m pipa_openrlhf.cli.launch_ray --ray.num_workers 2 \
    --ray.resources_per_worker '{"CPU":1}' --ray.max_failures 1 ${address[@]+"${address[@]}"} -- \
    pipa_openrlhf.cli.train_pipa --model.model_name_or_path "$work/own_right" --ds.param_dtype "$dtype" \
    --data.input_template '{}\n' --data.dataset "$work/words.jsonl" --data.annotation step --data.step_separator "" \
    --pipa.variant m --ds.lora.rank 64 --ds.lora.alpha 64 --train.batch_size 64 --train.micro_batch_size 32 \
    --train.max_epochs 2 --data.max_samples 256 --adam.lr 2e-4 --value.lr 2e-3 --prior.cache_dir "$work/prior_cache" \
    --ckpt.output_dir "$out/$1" --ckpt.load_enable --ckpt.save_steps 1 --ckpt.max_num 2
}

for name in undisturbed killed; do
  echo "== $name"
  start=$SECONDS
  (pipa_m $name) > >(tee "$out/$name.log") 2>&1 &
  run=$!
  if [ $name = killed ]; then
    if $as_job; then first=$head; else first=$run; fi
    python scripts/ray/kill_worker.py "$out/$name/metrics.jsonl" 3 "$first"
  fi
  wait $run
  echo "== $name: $((SECONDS - start)) s"
done
grep "; restart 1 of 1" "$out/killed.log"

if cmp -s "$out/undisturbed/adapter_model.safetensors" "$out/killed/adapter_model.safetensors"; then
  echo "== the adapters of both runs are the same, byte for byte"
else
  echo "error: the run whose worker was killed ended with another adapter" >&2
  exit 1
fi
