"""Models and data of the benchmarks, made on the spot so that every arm gets the very same tokens."""

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
EOS = "<|im_end|>"
# The characters from here on, all of them letters, are the tokens 0, 1, 2 ...
FIRST_CHARACTER = 0x4E00
CHARACTERS = 10000
END = CHARACTERS  # eos

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
    """A prompt and its answers in tokens, eos left out.

    The first half of the answers count as right and are chosen in pairs with the others, whatever they say: what a
    step costs does not depend on it, and so N answers are N / 2 pairs.
    """

    prompt: list[int]
    completions: list[list[int]]

    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """Every answer of the first half with one of the second."""
        half = len(self.completions) // 2
        return list(zip(self.completions[:half], self.completions[half:], strict=True))

    def sequences(self) -> list[list[int]]:
        """Prompt, answer and eos of each answer."""
        return [[*self.prompt, *one, END] for one in self.completions]


def character_tokenizer() -> PreTrainedTokenizerBase:
    """One token a character, whatever stands beside it: trainers tokenise prompt and answer apart or together."""
    vocabulary = {chr(FIRST_CHARACTER + token): token for token in range(CHARACTERS)}
    # ms-swift looks at how an "a" is tokenised, which is no token here.
    tokenizer = Tokenizer(models.WordLevel({**vocabulary, EOS: END}, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([EOS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def as_text(tokens: list[int]) -> str:
    """What :func:`character_tokenizer` reads as ``tokens``."""
    return "".join(chr(FIRST_CHARACTER + token) for token in tokens)


def make_model(folder: Path, shape: str, dtype: torch.dtype) -> None:
    """Random Llama of ``SHAPES[shape]`` with tied embeddings, and the tokenizer of characters."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
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

    def text(length: int) -> list[int]:
        return rng.choices(range(CHARACTERS), k=length)

    return [Problem(text(64), [text(191), text(191)]) for _ in range(count // 2)]


def write_data(folder: Path, problems: list[Problem]) -> None:
    """The same sequences as answers and as pairs, in random order; ``openrlhf.jsonl`` says the final eos in text."""
    answers, pairs = [], []
    for one in problems:
        prompt = as_text(one.prompt)
        for number, tokens in enumerate(one.completions):
            is_right = number < len(one.completions) // 2
            answers.append({"prompt": prompt, "completion": as_text(tokens), "label": is_right})
        for chosen, rejected in one.pairs():
            pairs.append({"prompt": prompt, "chosen": as_text(chosen), "rejected": as_text(rejected)})
    with_eos = [{**pair, "chosen": pair["chosen"] + EOS, "rejected": pair["rejected"] + EOS} for pair in pairs]
    for name, rows in (("answers", answers), ("pairs", pairs), ("openrlhf", with_eos)):
        random.Random(0).shuffle(rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass(frozen=True)
class Expected:
    """A sequence that every arm must train on: its tokens and loss tokens, eos included, and how often it occurs."""

    tokens: int
    loss_tokens: int
    times: int


def expected_sequences(problems: list[Problem]) -> dict[str, Expected]:
    """The sequences of ``problems`` by their keys; sampled answers may be the same."""
    held = [(ids, len(one.prompt)) for one in problems for ids in one.sequences()]
    times = Counter(sequence_key(*each) for each in held)
    return {
        (key := sequence_key(ids, prompt)): Expected(len(ids), len(ids) - prompt, times[key]) for ids, prompt in held
    }


def sequence_key(token_ids: list[int], prompt_length: int) -> str:
    """Identifies a sequence by its tokens and the end of its prompt."""
    return hashlib.sha256(repr((list(map(int, token_ids)), int(prompt_length))).encode()).hexdigest()[:16]
