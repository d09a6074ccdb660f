"""The whole way from flags and a file to samples, and what is printed about it."""

from dataclasses import replace

import pytest

from pipa_openrlhf.config import TrainConfig
from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.errors import UserError

PAIR = {"prompt": "the\n", "chosen": "cat", "rejected": "mat"}


@pytest.fixture
def load(make_args, tokenizers, log_lines):
    def load(path, tokenizer=None, seed=42, keep="all", **flags):
        log_lines.clear()
        config = replace(make_args(**flags), train=TrainConfig(seed=seed))
        return load_samples(config, tokenizer or tokenizers["bytes"], dataset=path, keep=keep)

    load.lines = log_lines
    return load


def decoded(loaded, tokenizer) -> list[str]:
    return [tokenizer.decode(sample.input_ids) for sample in loaded.samples]


def test_pairs_become_neighbours_chosen_first(load, write_rows, tokenizers):
    loaded = load(write_rows([PAIR, {**PAIR, "chosen": "sat"}]))
    expected = ["the\ncat<eos>", "the\nmat<eos>", "the\nsat<eos>", "the\nmat<eos>"]
    assert decoded(loaded, tokenizers["bytes"]) == expected
    assert [sample.pair_id for sample in loaded.samples] == [0, 0, 1, 1]
    assert (loaded.format, loaded.num_records, loaded.dropped) == ("paired", 4, {})


def test_the_format_and_the_counts_are_printed(load, write_rows):
    path = write_rows([PAIR])
    load(path)
    assert load.lines == [
        f"{path}: 1 rows",
        f"{path}: format paired (by its columns: prompt, chosen, rejected)",
        f"{path}: 2 of 2 answers kept, none dropped",
    ]


def test_a_pair_that_does_not_fit_goes_as_a_whole_only_when_paired(load, write_rows):
    path = write_rows([PAIR, {**PAIR, "chosen": "cat " * 50}])
    loaded = load(path, max_len=20)
    assert [sample.pair_id for sample in loaded.samples] == [0, 0, 1]
    assert loaded.dropped == {"longer than --data.max_len": 1}
    loaded = load(path, max_len=20, pairing="match")
    assert [sample.pair_id for sample in loaded.samples] == [0, 0]
    assert loaded.dropped == {"longer than --data.max_len": 1, "without a partner (--data.pairing match)": 1}
    assert load.lines[-1] == f"{path}: 1 pairs (as given), dropped without a partner: 0 right and 1 wrong answers"


def test_single_answers_are_paired_after_the_length_filter(load, write_rows):
    rows = [
        {"prompt": "the\n", "completion": "cat " * 50, "label": 1},
        {"prompt": "the\n", "completion": "cat", "label": 1},
        {"prompt": "the\n", "completion": "mat", "label": 0},
    ]
    path = write_rows(rows)
    for seed in range(4):
        loaded = load(path, max_len=20, pairing="match", seed=seed)
        assert [sample.where for sample in loaded.samples] == [f"{path} line 2", f"{path} line 3"]


def test_nothing_to_pair(load, write_rows):
    path = write_rows([{"prompt": "the", "completion": "cat", "label": 1}])
    with pytest.raises(UserError, match="found no problem with a right and a wrong answer"):
        load(path, pairing="match")


@pytest.mark.parametrize("keep, expected", [("positive", [1]), ("negative", [0]), ("all", [1, 0])])
def test_keep(load, write_rows, keep, expected):
    loaded = load(write_rows([PAIR]), keep=keep)
    assert [sample.answer_label for sample in loaded.samples] == expected
    assert sum(loaded.dropped.values()) == 2 - len(expected)


def test_nothing_to_keep(load, write_rows):
    path = write_rows([{"prompt": "the", "completion": "cat", "label": 1}])
    with pytest.raises(UserError, match=r"--data\.keep negative, but no answer is negative"):
        load(path, keep="negative")


def test_all_dropped_names_the_reasons(load, write_rows):
    path = write_rows([PAIR])
    with pytest.raises(UserError) as error:
        load(path, max_len=2)
    reason = f"2 longer than --data.max_len (first: {path} line 1)"
    assert str(error.value) == f"{path}: nothing left to train on, dropped {reason}"


def test_max_samples_counts_rows(load, write_rows, make_args, tokenizers):
    path = write_rows([PAIR] * 3)
    assert len(load(path, max_samples=2).samples) == 4
    args = make_args(max_samples=2)
    loaded = load_samples(args, tokenizers["bytes"], dataset=path, max_samples=3)
    assert len(loaded.samples) == 6


def test_step_labels(load, write_rows, tokenizers):
    row = {"prompt": "Q", "completions": ["ab", "c"], "labels": [1, 0]}
    path = write_rows([row])
    characters = tokenizers["characters"]
    assert load(path, characters, annotation="step").samples[0].labels.tolist() == [1, 1, 1, 0, 0]
    assert load(path, characters).samples[0].labels.tolist() == [0] * 5
    loaded = load(path, characters, annotation="step", step_separator=" -- ")
    assert decoded(loaded, characters) == ["Qab -- c<eos>"]


def test_a_format_by_flag(load, write_rows):
    path = write_rows([{**PAIR, "completion": "sat", "label": 1}])
    loaded = load(path, format="unpaired")
    assert (loaded.format, len(loaded.samples)) == ("unpaired", 1)
    assert "format unpaired (by --data.format:" in load.lines[1]
    with pytest.raises(UserError, match="line 1: no column 'completions'"):
        load(path, format="stepwise")


def test_chat_template_by_flag(load, write_rows, chat):
    path = write_rows([PAIR])
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    loaded = load(path, chat, apply_chat_template=True, tokenizer_chat_template=template, input_template="{}")
    assert decoded(loaded, chat)[0] == "user: the\n\nassistant: cat\n<eos>"
    assert load.lines[0] == "--data.input_template is not used with --data.apply_chat_template"


def test_input_template(load, write_rows, tokenizers):
    path = write_rows([PAIR])
    assert decoded(load(path, input_template="U: {}A:"), tokenizers["bytes"])[0] == "U: the\nA:cat<eos>"
    assert decoded(load(path, input_template="no braces"), tokenizers["bytes"])[0] == "the\ncat<eos>"
    assert load.lines[0] == "--data.input_template has no {}: it is not used"


def test_a_backslash_n_in_a_flag_is_pointed_out(load, write_rows):
    load(write_rows([PAIR]), input_template="{}\\n")
    assert "a backslash and an n" in load.lines[0]


@pytest.mark.parametrize("value, label", [("1", 1), ("0", 0), ("true", 1), ("False", 0), (" TRUE ", 1), ("1.0", 1)])
def test_labels_of_csv(load, tmp_path, tokenizers, value, label):
    path = tmp_path / "data.csv"
    path.write_text(f"prompt,completion,label\nthe,2,{value}\n")
    loaded = load(str(path))
    assert decoded(loaded, tokenizers["bytes"]) == ["the2<eos>"]
    assert loaded.samples[0].answer_label == label


@pytest.mark.parametrize("value", ["maybe", "2", "", "NA"])
def test_bad_labels_of_csv(load, tmp_path, value):
    path = tmp_path / "data.csv"
    path.write_text(f"prompt,completion,label\nthe,2,{value}\n")
    with pytest.raises(UserError, match="row 1: 'label' is .*; a label is true/false, 1/0"):
        load(str(path))


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def test_a_chat_template_may_be_a_file(load, write_rows, chat, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(TEMPLATE, encoding="utf-8")
    data = write_rows([{"prompt": "Q", "completion": "A", "label": 1}])
    for given in (str(path), TEMPLATE):
        loaded = load(data, chat, apply_chat_template=True, tokenizer_chat_template=given)
        assert decoded(loaded, chat) == ["<user>Q<assistant>A<eos>"]
        assert chat.chat_template == TEMPLATE  # what the model is saved with


@pytest.mark.parametrize(
    "template, problem",
    [
        ("template.jinja", "no such file, and no Jinja template"),
        ("/nowhere/at/all", "no such file"),
        ("{{ bos_token }}", "does not write the message"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not write the message"),
        ("{% for m in messages %}", "cannot be used"),
        ("{{ messages[0].content.nothing.there }}", "cannot be used"),
    ],
)
def test_a_chat_template_that_cannot_be_used(load, write_rows, chat, template, problem):
    data = write_rows([{"prompt": "Q", "completion": "A", "label": 1}])
    with pytest.raises(UserError) as error:
        load(data, chat, apply_chat_template=True, tokenizer_chat_template=template)
    assert problem in str(error.value) and "\n" not in str(error.value)
    assert f"--data.tokenizer_chat_template {template}" in str(error.value)


def test_an_unreadable_template_file(load, write_rows, chat, tmp_path):
    (tmp_path / "latin.jinja").write_bytes(b"{{ messages }} caf\xe9")
    data = write_rows([{"prompt": "Q", "completion": "A", "label": 1}])
    with pytest.raises(UserError, match="latin.jinja: cannot be read"):
        load(data, chat, apply_chat_template=True, tokenizer_chat_template=str(tmp_path / "latin.jinja"))


def test_what_a_template_cuts_off_an_answer_is_counted(load, write_rows, chat):
    cutting = TEMPLATE.replace("m['content']", "m['content'].split('</think>')[-1]")
    data = write_rows([{"prompt": "Q", "chosen": "<think>a</think>4", "rejected": "<think>b</think>4"}])
    with pytest.raises(UserError, match="2 the chat template leaves out part of the answer"):
        load(data, chat, apply_chat_template=True, tokenizer_chat_template=cutting)
    data = write_rows([{"prompt": "Q", "chosen": "4", "rejected": "<think>b</think>4"}])
    loaded = load(data, chat, apply_chat_template=True, tokenizer_chat_template=cutting)
    assert decoded(loaded, chat) == ["<user>Q<assistant>4<eos>"]


SINGLES = [{"prompt": "the\n", "completion": text, "label": label} for text, label in (("cat", True), ("mat", False))]
# What becomes of data, by the value of --data.pairing and whether the objective compares pairs.
OUTCOMES = {
    ("auto", False): {"pairs": 2, "singles": 2},
    ("auto", True): {"pairs": 2, "singles": "holds single answers"},
    ("given", False): {"pairs": 2, "singles": "holds single answers"},
    ("given", True): {"pairs": 2, "singles": "holds single answers"},
    ("match", False): {"pairs": 2, "singles": 2},
    ("match", True): {"pairs": 2, "singles": 2},
}


@pytest.mark.parametrize("pairing, pairs_only", OUTCOMES)
def test_pairing(write_rows, tokenizers, make_args, pairing, pairs_only):
    for kind, rows in (("pairs", [PAIR]), ("singles", SINGLES)):
        args = make_args(pairing=pairing)
        path, expected = write_rows(rows), OUTCOMES[pairing, pairs_only][kind]
        options = {"dataset": path, "pairs_only": pairs_only}
        if isinstance(expected, str):
            with pytest.raises(UserError, match=f"{expected}.*--data.pairing match"):
                load_samples(args, tokenizers["bytes"], **options)
        else:
            samples = load_samples(args, tokenizers["bytes"], **options).samples
            assert len(samples) == expected
            matched = pairing == "match" or kind == "pairs"
            assert (samples[0].pair_id is not None and samples[0].pair_id == samples[1].pair_id) is matched
