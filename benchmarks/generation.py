"""Our batches against transformers' continuous batching, or vLLM: the same prompts, model, data type and end, greedy.

    python benchmarks/generation.py --model MODEL --problems FILE [--other vLLM] [--max 192] [--max_new_tokens 24] \\
      [--rounds 3]

Both arms take turns, and stay loaded between their rounds, each of which has problems of its own. Printed: seconds of
each round, how many answers are the same, and the ratio of the other arm to ours, with the smallest and the largest of
the rounds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import islice

from measure import print_head, print_ratio, print_table
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from pipa_openrlhf.config import ModelSource, NumericsConfig
from pipa_openrlhf.data.tokenise import encode
from pipa_openrlhf.distributed.strategy import device, dtype_of, fastest_dtype
from pipa_openrlhf.generate.config import VllmConfig, WriterConfig
from pipa_openrlhf.generate.problems import read_problems
from pipa_openrlhf.generate.sampling import Answer, SamplingSettings, end_tokens, plan_batches, sample_batches
from pipa_openrlhf.generate.vllm_engine import vllm_batches
from pipa_openrlhf.model.loading import load_causal_lm, load_tokenizer


def main() -> None:
    arguments = parse_arguments()
    dtype = arguments.dtype or fastest_dtype()
    tokenizer = load_tokenizer(arguments.model, padding_side="left")
    model = load_causal_lm(arguments.model, dtype_of(dtype), "sdpa").to(device())
    rounds = arguments.rounds + 1  # the first sets kernels up
    problems = read_problems(arguments.problems, arguments.max * rounds)
    if len(problems) < arguments.max * rounds:
        sys.exit(f"error: {arguments.problems} has {len(problems)} problems, not {rounds} times {arguments.max}")
    template = arguments.input_template.encode().decode("unicode_escape")
    prompts = [template.format(one.question) for one in problems]
    settings = SamplingSettings(max_new_tokens=arguments.max_new_tokens)
    # Problems of its own for each round: vLLM keeps what it knows of those that it has seen.
    of_rounds = [prompts[start : start + arguments.max] for start in range(0, len(prompts), arguments.max)]
    if arguments.other == "vLLM":
        other = from_vllm(arguments, dtype, tokenizer, prompts, settings)
    else:
        other = (continuous(model, tokenizer, some, arguments.max_new_tokens) for some in of_rounds)
    arms = {"ours": (ours(model, tokenizer, some, settings) for some in of_rounds), arguments.other: other}
    print_head()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    same = total = 0
    for number in range(rounds):
        answers = []
        for name, arm in arms.items():
            started = time.perf_counter()
            answers.append(next(arm))
            seconds[name] += [time.perf_counter() - started] if number else []
        if number:
            same += sum(one == another for one, another in zip(*answers, strict=True))
            total += len(answers[0])
    print_table(["arm", *(f"round {n + 1}" for n in range(arguments.rounds))], rows_of(seconds))
    print(f"{dtype}, {arguments.max} prompts a round, at most {arguments.max_new_tokens} new tokens")
    print(f"{same} of {total} answers are the same")
    ratios = [other / mine for mine, other in zip(*seconds.values())]
    print_ratio(f"seconds, {arguments.other} / ours", statistics.median(ratios), (min(ratios), max(ratios)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--problems", required=True)
    parser.add_argument("--other", choices=["continuous batching", "vLLM"], default="continuous batching")
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.3, help="of vLLM")
    parser.add_argument("--input_template", default="{}\\n")
    parser.add_argument("--max", type=int, default=192)
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: what this machine is faster in")
    return parser.parse_args()


def rows_of(seconds: dict[str, list[float]]) -> list[list[str]]:
    return [[name, *(f"{one:.1f} s" for one in taken)] for name, taken in seconds.items()]


def ours(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], settings: SamplingSettings
) -> list[list[int]]:
    """Token ids of the answers in the order of their prompts, without their ends."""
    return in_order(sample_batches(model, tokenizer, prompts, plan_batches(prompts, settings), settings))


def from_vllm(
    arguments: argparse.Namespace,
    dtype: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    settings: SamplingSettings,
) -> Iterator[list[list[int]]]:
    """As ``ours``, of each round; the engine is loaded once."""
    writer = WriterConfig(
        model=ModelSource(model_name_or_path=arguments.model),
        ds=NumericsConfig(param_dtype=dtype),
        vllm=VllmConfig(enable=True, gpu_memory_utilization=arguments.gpu_memory_utilization),
    )
    rounds = []
    for start in range(0, len(prompts), arguments.max):
        planned = plan_batches(prompts[start : start + arguments.max], settings)
        rounds.append([[start + index for index in batch] for batch in planned])
    answered = vllm_batches(writer, tokenizer, prompts, sum(rounds, []), settings)
    for batches in rounds:
        yield in_order(islice(answered, len(batches)))


def in_order(answered: Iterable[tuple[list[int], list[list[Answer]]]]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for batch, answers in answered:
        found.update((index, list(of_prompt[0].token_ids)) for index, of_prompt in zip(batch, answers, strict=True))
    return [found[index] for index in sorted(found)]


def continuous(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[list[int]]:
    """As ``ours``."""
    ends = end_tokens(model.generation_config, tokenizer)
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
