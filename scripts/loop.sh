# Sourced by scripts that train on a model's own answers in rounds: what such rounds are made of.

# read_flags FLAGS...: sets fast, rounds, start, seed and work. A script's own flags go to its function own_flag NAME VALUE,
# which fails on a name that it does not know; own_flags lists them for the message.
read_flags() {
  fast=false rounds="" start="" seed=0 work=""
  while [ $# -gt 0 ]; do
    case "$1" in
      --fast) fast=true; shift; continue ;;
      --rounds) rounds=${2:?--rounds needs a number} ;;
      --start) start=${2:?--start needs a model} ;;
      --seed) seed=${2:?--seed needs a number} ;;
      --work) work=${2:?--work needs a folder} ;;
      *)
        if ! own_flag "$1" "${2:-}"; then
          echo "error: unknown argument $1 (use --fast, --rounds, $own_flags--start, --seed or --work)" >&2
          exit 1
        fi ;;
    esac
    shift 2 || break
  done
}

# check_loop: sizes, and what the flags of every loop must be. Sets short (a part of the folder's name), start and rounds.
check_loop() {
  if $fast; then
    short=-fast rounds=${rounds:-2} problems=12 test=12 batch=16
  else
    short="" rounds=${rounds:-3} problems=200 test=600 batch=64
  fi
  case "$rounds" in
    '' | *[!0-9]* | 0) echo "error: --rounds $rounds is no number of rounds" >&2; exit 1 ;;
  esac
  if [ -z "$start" ]; then
    start=runs/quickstart$short-seed0/own_right
    if [ ! -e "runs/quickstart$short-seed0/done/own_right" ]; then
      echo "error: there is no $start to start from: run bash scripts/quickstart.sh${short:+ --fast}, or give --start" >&2
      exit 1
    fi
  fi
}

# The quickstart's problems, prompts and lengths.
made=(--largest_value 10 --turned 0.7 --train 0 --validation 0)
set_prompt() { prompt=(--data.input_template $'{}\n' --ds.param_dtype "$dtype"); }

# make_test: the held-out problems, the same for all rounds.
make_test() {
  stage "$work" make_test python -m recipes.word_problems.make_problems --output_dir "$work/problems_test" \
    --seed "$seed" --sample 0 --test "$test" "${made[@]}"
}

# make_prompts ROUND: new problems to sample answers to; they share no equation with the held-out ones.
make_prompts() {
  stage "$work" "make_problems_$1" python -m recipes.word_problems.make_problems --output_dir "$work/problems_$1" \
    --seed $((1000 * (seed + 1) + $1)) --sample "$problems" --test 0 "${made[@]}"
}

# sample NAME MODEL OUTPUT: eight answers to each problem of the round.
sample() {
  stage "$work" "sample_$1" python -m pipa_openrlhf.cli.sample --model.model_name_or_path "$2" \
    --problems.file "$work/problems_$round/sample.jsonl" --sample.output "$3" --train.seed "$seed" \
    --sample.num_answers 8 --sample.temperature 1 --sample.max_new_tokens 24 "${prompt[@]}"
}

# train NAME MODULE START [MORE FLAGS]: two passes over what was sampled.
train() {
  local name=$1 module=$2 from=$3
  shift 3
  stage "$work" "$name" "${launch[@]}" "pipa_openrlhf.cli.$module" --model.model_name_or_path "$from" "${prompt[@]}" \
    --ds.lora.rank 64 --ds.lora.alpha 64 --train.batch_size "$batch" --train.micro_batch_size "$batch" \
    --train.max_epochs 2 --train.seed "$seed" --adam.lr 2e-4 --prior.cache_dir "$work/prior_cache" \
    --ckpt.output_dir "$work/$name" --ckpt.load_enable --ckpt.save_steps 40 --ckpt.max_num 1 "$@"
}

# evaluate NAME MODEL: greedy answers to the held-out problems.
evaluate() {
  stage "$work" "evaluate_$1" python -m pipa_openrlhf.cli.evaluate --model.model_name_or_path "$2" \
    --problems.file "$work/problems_test/test.jsonl" --evaluate.output_dir "$work/evaluate_$1" \
    --evaluate.max_new_tokens 24 "${prompt[@]}"
}

# report TITLE BASELINE: a table of evaluations, and a page with the curves of runs.
report() {
  commands_of "$work" > "$work/commands.txt"
  echo "== report"
  python -m pipa_openrlhf.cli.report --report.title "$1" --report.evaluations "${evaluations[@]}" \
    --report.runs "${runs[@]}" --report.baseline "$2" --report.commands "$work/commands.txt" \
    --report.output "$work/report.html"
}
