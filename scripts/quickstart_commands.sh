# Sourced by the quickstart and its rows, which set work and seed: how it trains and evaluates.

template=$'{}\n'
prompt=(--data.input_template "$template" --ds.param_dtype "$dtype")
lora=(--ds.lora.rank 64 --ds.lora.alpha 64)
model=$work/model data=$work/problems sft=$work/sft

# evaluate NAME MODEL [MORE FLAGS]: greedy answers to the test problems.
evaluate() {
  local name=$1 folder=$2
  shift 2
  stage "$work" "evaluate_$name" python -m pipa_openrlhf.cli.evaluate --model.model_name_or_path "$folder" \
    --problems.file "$data/test.jsonl" --evaluate.output_dir "$work/evaluate_$name" "${prompt[@]}" \
    --evaluate.max_new_tokens 24 "$@"
}

# train NAME MODULE START [MORE FLAGS]: one run, which goes on from its last checkpoint.
train() {
  local name=$1 module=$2 start=$3
  shift 3
  stage "$work" "$name" "${launch[@]}" "pipa_openrlhf.cli.$module" --model.model_name_or_path "$start" "${prompt[@]}" \
    --train.seed "$seed" --ckpt.output_dir "$work/$name" --ckpt.load_enable --ckpt.save_steps 40 --ckpt.max_num 1 "$@"
}
