"""Our batches against transformers' continuous batching: the same prompts, model, data type and end, greedy answers.

    python benchmarks/generation.py --model MODEL --problems FILE [--max 192] [--max_new_tokens 24] [--rounds 3]

Both arms run in this process and take turns. Printed: seconds of each round, how many answers are the same, and the
ratio continuous batching / ours, with the smallest and the largest of the rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable

from measure import print_head, print_ratio, print_table
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipa_openrlhf.data.tokenise import encode
from pipa_openrlhf.distributed.strategy import device, dtype_of, fastest_dtype
from pipa_openrlhf.generate.problems import read_problems
from pipa_openrlhf.generate.sampling import SamplingSettings, end_tokens, plan_batches, sample_batches
from pipa_openrlhf.model.loading import load_causal_lm, load_tokenizer


def main() -> None:
    arguments = parse_arguments()
    dtype = arguments.dtype or fastest_dtype()
    tokenizer = load_tokenizer(arguments.model, padding_side="left")
    model = load_causal_lm(arguments.model, dtype_of(dtype), "sdpa").to(device())
    problems = read_problems(arguments.problems, arguments.max)
    prompts = [arguments.input_template.encode().decode("unicode_escape").format(one.question) for one in problems]
    arms: dict[str, Callable[[], list[list[int]]]] = {
        "ours": lambda: ours(model, tokenizer, prompts, arguments.max_new_tokens),
        "continuous": lambda: continuous(model, tokenizer, prompts, arguments.max_new_tokens),
    }
    print_head()
    answers = {name: arm() for name, arm in arms.items()}  # the first round sets kernels up
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(arguments.rounds):
        for name, arm in arms.items():
            started = time.perf_counter()
            arm()
            seconds[name].append(time.perf_counter() - started)
    print_table(["arm", *(f"round {n + 1}" for n in range(arguments.rounds))], rows_of(seconds))
    same = sum(one == other for one, other in zip(answers["ours"], answers["continuous"], strict=True))
    print(
        f"{dtype}, {len(prompts)} prompts, at most {arguments.max_new_tokens} new tokens; {same} answers are the same"
    )
    ratios = [other / mine for mine, other in zip(seconds["ours"], seconds["continuous"])]
    print_ratio("seconds, continuous batching / ours", statistics.median(ratios), (min(ratios), max(ratios)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--problems", required=True)
    parser.add_argument("--input_template", default="{}\\n")
    parser.add_argument("--max", type=int, default=192)
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: what this machine is faster in")
    return parser.parse_args()


def rows_of(seconds: dict[str, list[float]]) -> list[list[str]]:
    return [[name, *(f"{one:.1f} s" for one in taken)] for name, taken in seconds.items()]


def ours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[list[int]]:
    """Token ids of the answers, without their ends."""
    settings = SamplingSettings(max_new_tokens=max_new_tokens)
    found: dict[int, list[int]] = {}
    for batch, answers in sample_batches(model, tokenizer, prompts, plan_batches(prompts, settings), settings):
        found.update((index, list(of_prompt[0].token_ids)) for index, of_prompt in zip(batch, answers, strict=True))
    return [found[index] for index in range(len(prompts))]


def continuous(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[list[int]]:
    """As ``ours``."""
    ends = end_tokens(model, tokenizer)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    # CUDA graphs are what its warming up is for.
    outputs = model.generate_batch(
        encode(prompts, tokenizer), generation_config=config, progress_bar=False, warmup=device().type == "cuda"
    )
    return [[token for token in output.generated_tokens if token not in ends] for output in outputs.values()]


if __name__ == "__main__":
    main()
