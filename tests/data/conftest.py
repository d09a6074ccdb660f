"""Small tokenizers made on the spot, the data flags at their defaults, and files to read."""

import json
import os
import threading
from dataclasses import replace
from multiprocessing import Pipe

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipa_openrlhf.config import DataConfig, RunConfig, TrainConfig
from pipa_openrlhf.data import prepare, workers
from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.data.layouts import choose_reading
from pipa_openrlhf.data.record import Record

EOS = "<eos>"
CORPUS = ["the cat sat on the mat", "one plus two is three", "Step 1: 12 + 7 = 19\nStep 2: 19 * 3 = 57\n#### 57"] * 5
WORDS = sorted({word for line in CORPUS for word in line.replace(":", " : ").split()})
CHAT_TEMPLATE = (  # jinja drops a newline right after a block, hence the quoted ones
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)


def _wrap(tokenizer: Tokenizer, unk: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, unk_token=unk)


def _byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet))
    return _wrap(tokenizer)


def _words() -> PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0, **{word: index for index, word in enumerate(WORDS, start=1)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(tokenizer, "[UNK]")


def _metaspace() -> PreTrainedTokenizerFast:
    """Puts a space in front of every text it is called on, as Llama 2 and Mistral do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=140, special_tokens=["<unk>"])
    tokenizer.train_from_iterator([*CORPUS, "\n", "x y z q w"], trainer)
    return _wrap(tokenizer, "<unk>")


def _characters() -> PreTrainedTokenizerFast:
    letters = [chr(code) for code in range(32, 127)] + ["\n", "é", "∑"]
    tokenizer = Tokenizer(models.WordLevel({"?unk": 0, **{c: i for i, c in enumerate(letters, 1)}}, unk_token="?unk"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer, "?unk")


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {"bytes": _byte_level(), "words": _words(), "metaspace": _metaspace(), "characters": _characters()}


@pytest.fixture
def chat() -> PreTrainedTokenizerFast:
    """The character tokenizer with a chat template; a new one a test, because tests change the template."""
    tokenizer = _characters()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def make_args():
    """Flags of train_pipa at their defaults, some of the data flags changed: ``make_args(annotation="step")``."""

    def make(**data) -> RunConfig:
        return RunConfig(data=DataConfig(**data))

    return make


@pytest.fixture(scope="session")
def read_records():
    """``read_records([row, ...], annotation="step")``: the layout of the rows, and their records."""

    def read(rows: list[dict], **flags) -> tuple[str, list[Record]]:
        sample = [(f"data.jsonl line {number}", row) for number, row in enumerate(rows, start=1)]
        reading = choose_reading(sample, "data.jsonl", DataConfig(**flags))
        return reading.layout, [
            one for index, (where, row) in enumerate(sample) for one in reading.records(row, where, index)
        ]

    return read


@pytest.fixture
def write_rows(tmp_path):
    """``write_rows([row, ...])``: path of a JSONL file, one row a line."""

    def write(rows: list, name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def small(monkeypatch):
    """Forty rows are many: they are kept, and read by several processes."""
    monkeypatch.setattr(prepare, "FEW_ROWS", 5)
    monkeypatch.setattr(prepare, "ROWS_OF_ONE_PROCESS", 20)
    monkeypatch.setattr(prepare, "_CHUNK", 7)


@pytest.fixture
def load(small, make_args, tokenizers, tmp_path, log_lines):
    def load(path, tokenizer=None, seed=42, probs=None, cache="cache", **flags):
        log_lines.clear()
        defaults = {
            "cache_dir": str(tmp_path / cache),
            "max_len": 20,
            "num_proc": 1,
            "annotation": "step",
            "prefixes": "false",
        }
        config = replace(make_args(**{**defaults, **flags}), train=TrainConfig(seed=seed))
        return load_samples(config, tokenizer or tokenizers["bytes"], dataset=path, probs=probs)

    load.lines = log_lines
    return load


class WorkerThread:
    """A worker as a thread: what it is sent and replies goes through a pipe as ever, and nothing has to start."""

    def __init__(self, function, environment):
        assert function == "pipa_openrlhf.data.workers.work"
        self.connection, theirs = Pipe()
        threading.Thread(target=workers.work, args=[os.dup(theirs.fileno())], daemon=True).start()
        theirs.close()

    receive = workers._Worker.receive

    def end(self):
        self.connection.close()


@pytest.fixture
def worker_threads(monkeypatch):
    monkeypatch.setattr(workers, "_Worker", WorkerThread)
