# Sourced by scripts that run experiments in stages. Installs the package, sets the environment, defines `stage`.

bash scripts/install.sh
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# Threads that sleep while they wait: spinning ones make training several times slower when anything else is running.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
# This allocator makes training on CPU about 1.3 times as fast where it is installed (Debian: libtcmalloc-minimal4).
for library in /usr/lib/*-linux-gnu/libtcmalloc_minimal.so.4; do
  if [ -e "$library" ]; then export LD_PRELOAD="$library"; fi
done

source scripts/stage.sh

# bf16, or float32 on a CPU that is slower in bf16.
machine=$(python -c 'from pipa_openrlhf.distributed.strategy import fastest_dtype, on_cpu
print(fastest_dtype(), "cpu" if on_cpu() else "accelerator")' | tail -n 1)
read -r dtype device <<< "$machine"

# How training is started. A CPU is one rank, which needs no launcher: DeepSpeed's imports torch twice more, for longer
# than a short run takes. Two runs on one machine need two ports.
if [ "$device" = cpu ]; then
  launch=(python -m)
else
  launch=(deepspeed --master_port $((20000 + RANDOM % 20000)) --module)
fi
