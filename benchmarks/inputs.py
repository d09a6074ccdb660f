"""Models and data of the benchmarks, made on the spot so that every arm gets the very same tokens."""

import hashlib
import json
import random
import string
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parent.parent
EOS = "<|im_end|>"

# The quick model keeps the full one's proportions: a fifth of a forward pass is the output head.
SHAPES = {
    "quick": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 10240,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}


@dataclass(frozen=True)
class Problem:
    """A prompt and its answers; ``labels`` says which are right."""

    prompt: str
    completions: list[str]
    labels: list[int]

    def pairs(self) -> list[tuple[str, str]]:
        """Every right answer with a wrong one; there are as many of either."""
        right = [text for text, label in zip(self.completions, self.labels) if label]
        wrong = [text for text, label in zip(self.completions, self.labels) if not label]
        return list(zip(right, wrong, strict=True))


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """The tests' tokenizer: one token a byte."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import tiny

    return tiny.make_tokenizer()


def make_model(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """Random Llama of ``SHAPES[shape]`` with tied embeddings, and the byte tokenizer."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def usual_rank(shape: str) -> int:
    """The LoRA rank whose share of the model is that of 64 in one of width 4096, the method's."""
    return max(1, SHAPES[shape]["hidden_size"] // 64)


def model_size(folder: str | Path) -> dict:
    """What a result says about the model."""
    config = AutoConfig.from_pretrained(folder)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    return {name: getattr(config, name) for name in names}


def equal_problems(count: int, seed: int = 0) -> list[Problem]:
    """``count`` sequences of 64 + 192 tokens, eos included, two to a prompt as pairs need it."""
    rng = random.Random(seed)
    return [Problem(_text(rng, 64), [_text(rng, 191), _text(rng, 191)], [1, 0]) for _ in range(count // 2)]


def natural_problems(count: int, seed: int = 0) -> list[Problem]:
    """``count`` sequences, eight answers a prompt, half of them right; lengths as sampled answers have them.

    Log-normal completions (sigma 0.5) of 60 tokens on average and prompts of 20: a quarter of the tokens are prompt.
    """
    rng = random.Random(seed)
    labels = [1, 0] * 4

    def answer() -> str:
        return _text(rng, int(min(max(rng.lognormvariate(3.97, 0.5), 8), 300)))

    return [Problem(_text(rng, rng.randint(14, 26)), [answer() for _ in labels], labels) for _ in range(count // 8)]


def read_problems(path: str, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Problem]:
    """About ``count`` sequences of a JSONL file with prompt, completion and label: up to eight a prompt, half right.

    Trainers differ in whether they tokenise prompt and answer together; answers to which that makes a difference are
    left out.
    """
    answers: dict[str, tuple[list[str], list[str]]] = {}
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            if not isinstance(row["prompt"], str) or not isinstance(row["completion"], str):
                raise SystemExit(f"{path}: prompt and completion must be text")
            if _boundary_is_exact(row["prompt"], row["completion"], tokenizer):
                answers.setdefault(row["prompt"], ([], []))[not row["label"]].append(row["completion"])
    problems, sequences = [], 0
    for prompt, (right, wrong) in answers.items():
        half = min(len(right), len(wrong), 4)
        if half and sequences < count:
            mixed = [text for pair in zip(right[:half], wrong[:half]) for text in pair]
            problems.append(Problem(prompt, mixed, [1, 0] * half))
            sequences += 2 * half
    return problems


def whole_batches(problems: list[Problem], batch_size: int) -> list[Problem]:
    """Problems, from the front, whose sequences fill whole batches; the last one may lose pairs."""
    left = sum(len(problem.completions) for problem in problems) // batch_size * batch_size
    if not left:
        raise SystemExit(f"fewer than {batch_size} answers, half of them right, are usable")
    kept = []
    for problem in problems:
        if left:
            # Right and wrong answers alternate.
            kept.append(Problem(problem.prompt, problem.completions[:left], problem.labels[:left]))
            left -= len(kept[-1].completions)
    return kept


def write_data(folder: Path, problems: list[Problem], eos: str) -> None:
    """The same sequences as answers and as pairs, in random order; ``openrlhf.jsonl`` says the final eos in text."""
    answers = [
        {"prompt": one.prompt, "completion": text, "label": bool(label)}
        for one in problems
        for text, label in zip(one.completions, one.labels)
    ]
    pairs = [
        {"prompt": one.prompt, "chosen": chosen, "rejected": rejected}
        for one in problems
        for chosen, rejected in one.pairs()
    ]
    with_eos = [{**pair, "chosen": pair["chosen"] + eos, "rejected": pair["rejected"] + eos} for pair in pairs]
    for name, rows in (("answers", answers), ("pairs", pairs), ("openrlhf", with_eos)):
        random.Random(0).shuffle(rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def expected_sequences(problems: list[Problem], tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, int]]:
    """Key of every sequence -> its tokens and its loss tokens, eos included."""
    result = {}
    for problem in problems:
        prompt = tokenizer(problem.prompt, add_special_tokens=False)["input_ids"]
        for text in problem.completions:
            answer = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            result[sequence_key(prompt + answer, len(prompt))] = (len(prompt) + len(answer), len(answer))
    return result


def sequence_key(token_ids: list[int], prompt_length: int) -> str:
    """Identifies a sequence by its tokens and the end of its prompt."""
    return hashlib.sha256(repr((list(map(int, token_ids)), int(prompt_length))).encode()).hexdigest()[:16]


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder."""
    return AutoTokenizer.from_pretrained(folder)


def _text(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(string.ascii_letters, k=length))


def _boundary_is_exact(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    apart = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, completion)]
    return tokenizer(prompt + completion, add_special_tokens=False)["input_ids"] == apart[0] + apart[1]
