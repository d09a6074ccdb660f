# Sourced by scripts that run experiments in stages. Installs the package, sets the environment, defines `stage`.

source scripts/environment.sh
source scripts/stage.sh

# bf16, or float32 on a CPU that is slower in bf16. Measured once, for the scripts too that one of ours calls.
if [ -z "${PIPA_MACHINE:-}" ]; then
  PIPA_MACHINE=$(python -c 'from pipa_openrlhf.distributed.strategy import fastest_dtype, on_cpu
print(fastest_dtype(), "cpu" if on_cpu() else "accelerator")' | tail -n 1)
  export PIPA_MACHINE
fi
read -r dtype device <<< "$PIPA_MACHINE"

# How training is started. A CPU is one rank, which needs no launcher: DeepSpeed's imports torch twice more, for longer
# than a short run takes. Two runs on one machine need two ports.
if [ "$device" = cpu ]; then
  launch=(python -m)
else
  launch=(deepspeed --master_port $((20000 + RANDOM % 20000)) --module)
fi
