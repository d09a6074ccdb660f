# Sourced by every script of this folder: the recipe of the paper (section 3.1), once, and what the scripts are made of.
#   bash SCRIPT [--model deepseek|qwen] [--work FOLDER] [--lr RATE] [--dry_run] [--toy FOLDER]
# Run again, it goes on where it stopped. docs/paper.md says what can be set from the environment.
set -euo pipefail
script=$(realpath "$0")
name=$(basename "$script" .sh)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
if [ -x .venv/bin/python ]; then export PATH="$PWD/.venv/bin:$PATH"; fi

model=deepseek work=runs/paper lr="" toy="" commands_only=false arguments=("$@")
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model=${2:?--model is deepseek or qwen}; shift ;;
    --work) work=${2:?--work needs a folder}; shift ;;
    --lr) lr=${2:?--lr needs a learning rate}; shift ;;
    --toy) toy=${2:?--toy needs a folder}; shift ;;
    --dry_run) bash "$script" "${arguments[@]/#--dry_run/--commands_only}" | python scripts/paper/plan.py; exit ;;
    --commands_only) commands_only=true ;;
    *) echo "error: unknown argument $1 (use --model, --work, --lr, --dry_run or --toy)" >&2; exit 1 ;;
  esac
  shift
done

case "$model" in
  deepseek) base=${DEEPSEEK:-deepseek-ai/deepseek-math-7b-instruct} best_lr=5e-5 ;;
  qwen) base=${QWEN:-Qwen/Qwen2.5-Math-7B-Instruct} best_lr=5e-7 ;;
  *) echo "error: --model $model is not deepseek or qwen" >&2; exit 1 ;;
esac
alphamath=${ALPHAMATH:-MARIO-Math-Reasoning/AlphaMath-Trainset}
gsm8k=${GSM8K:-openai/gsm8k@main}
math=${MATH:-DigitalLearningGmbH/MATH-lighteval}
read -ra regrade <<< "${REGRADE:+--regrade $REGRADE}"

# What comes last wins: at toy size the same commands end in these flags.
batch=256 sft_batch=1024 toy_train=() toy_evaluate=()
if [ -n "$toy" ]; then
  work=$work/toy  # what is done there is not done at full size
  base=$toy/model alphamath=$toy/alphamath.json gsm8k=$toy/gsm8k.jsonl math=$toy/math.jsonl LAUNCH=${LAUNCH:-python -m}
  batch=8 sft_batch=4
  toy_train=(--data.max_samples 16 --data.max_len 512 --train.max_epochs 1 --ds.param_dtype fp32 --ds.zero_stage 0)
  toy_evaluate=(--problems.max 2 --evaluate.max_new_tokens 8 --ds.param_dtype fp32)
fi

read -ra launch <<< "${LAUNCH:-deepspeed --module}"

folder=$work/$model data_folder=$work/data
sft=$folder/sft

shared=(--data.dataset "$data_folder/answers.jsonl" --data.format alphamath --data.max_len 2048
  --ds.lora.rank 64 --ds.lora.alpha 16 --ds.zero_stage 2 --ds.param_dtype bf16
  --model.gradient_checkpointing_enable --train.max_tokens_per_micro_batch 16384
  --ckpt.load_enable --ckpt.save_steps 100 --ckpt.max_num 1)

source scripts/stage.sh

# in_stage FOLDER NAME COMMAND...: a stage, or a line with its command.
in_stage() {
  if $commands_only; then
    if [ -e "$1/done/$2" ]; then echo "# $1 $2: done before"; else shift 2; printf '%q ' "$@"; echo; fi
  else
    stage "$@"
  fi
}

prepare() {
  in_stage "$work" prepare python -m pipa_openrlhf.cli.prepare_alphamath --input "$alphamath" \
    --output_dir "$data_folder" --on_error skip ${regrade[@]+"${regrade[@]}"}
}

# fine_tune NAME START KEEP: the SFT stage, and the (T) priors of Table 3.
fine_tune() {
  in_stage "$folder" "$1" "${launch[@]}" pipa_openrlhf.cli.train_sft --model.model_name_or_path "$2" "${shared[@]}" \
    --data.keep "$3" --train.max_epochs 3 --train.batch_size "$sft_batch" --adam.lr 4e-5 \
    --ckpt.output_dir "$folder/$1" ${toy_train[@]+"${toy_train[@]}"}
}

run_sft() { prepare; fine_tune sft "$base" positive; }

# evaluate NAME: step-level beam search with (B1, B2) = (3, 1) on GSM8K's test problems and (1, 1) on MATH's. No value
# ranks the beams: the paper leaves search with g to later work, and DPO and KTO have none.
evaluate() {
  search "$1" gsm8k "$gsm8k" 3
  search "$1" math "$math" 1
}

# search NAME BENCHMARK PROBLEMS BEAMS
search() {
  in_stage "$folder" "$1_$2" python -m pipa_openrlhf.cli.evaluate --model.model_name_or_path "$folder/$1" \
    --problems.file "$3" --prompt.style alphamath --evaluate.decode sbs --sbs.beams "$4" --sbs.samples 1 --sbs.value none \
    --sbs.temperature 0.6 --sbs.max_depth 10 ${EXECUTE_CODE:+--sbs.execute_code} --evaluate.max_new_tokens 2048 --ds.param_dtype bf16 \
    --evaluate.output_dir "$folder/$1_$2" ${toy_evaluate[@]+"${toy_evaluate[@]}"}
}

# align NAME DATA LABELS METHOD [MORE FLAGS]: SFT, one alignment run from it, and its evaluation.
#   DATA paired or unpaired; LABELS answer or step; METHOD as in the first column below.
align() {
  local run=$1 data=$2 labels=$3 method=$4 rate=$best_lr size=$batch flags=()
  shift 4
  case "$method" in
    dpo) flags=(train_dpo) ;;
    ipo) flags=(train_dpo --model.ipo_enable) ;;
    step_dpo) flags=(train_dpo --dpo.step_loss l1) ;;
    kto) flags=(train_kto) ;;
    step_kto) flags=(train_kto --kto.step_loss l1) ;;
    pipa_m) flags=(train_pipa --pipa.variant m) ;;
    pipa_n) flags=(train_pipa --pipa.variant n) ;;
  esac
  case "$method" in
    *dpo | ipo) rate=5e-7 flags+=(--model.beta 0.1); [ -z "$toy" ] || size=4 ;;
    *kto) flags+=(--model.beta 0.1) ;;
  esac
  if [ "$data" = paired ]; then flags+=(--data.pairing match); fi
  if [ -n "$lr" ] && [ "$lr" != "$rate" ]; then rate=$lr run=${run}_lr$lr; fi
  run_sft
  in_stage "$folder" "$run" "${launch[@]}" "pipa_openrlhf.cli.${flags[0]}" --model.model_name_or_path "$sft" \
    "${shared[@]}" "${flags[@]:1}" --data.annotation "$labels" --train.max_epochs 1 --train.batch_size "$size" \
    --adam.lr "$rate" --prior.cache_dir "$work/prior_cache" "$@" --ckpt.output_dir "$folder/$run" \
    ${toy_train[@]+"${toy_train[@]}"}
  evaluate "$run"
}
