"""g and the log-ratio of single tokens against a model's own output, and the command on a tiny run."""

import json
import os

import numpy as np
import pytest
import torch
from samples import random_samples
from tiny import flags, make_model, make_tokenizer, read_jsonl, run_in_process, train, write_jsonl

from pipa_openrlhf.data.samples import Sample
from pipa_openrlhf.evaluate.credit import credit_rows, prior_of, token_log_probs, token_texts, token_values
from pipa_openrlhf.model.policy import ValueHead
from pipa_openrlhf.model.value_model import ValueModel


def test_g_and_log_probs_are_those_that_predict_the_token():
    model = make_model(1).double()
    torch.manual_seed(2)
    head = ValueHead(16, 16, torch.float64)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    samples = random_samples([(5, 4), (0, 6), (1, 1)], 258)
    values = token_values(ValueModel(model, head), samples)
    log_probs = token_log_probs(model, samples)
    for sample, of_values, of_log_probs in zip(samples, values, log_probs):
        output = model(torch.as_tensor(sample.input_ids).long()[None], output_hidden_states=True)
        for place in range(len(sample.labels)):
            at = sample.prompt_len + place
            if at == 0:
                assert of_values[0] is None and of_log_probs[0] is None
                continue
            g = torch.sigmoid(head(output.hidden_states[-1][0, at - 1])).item()
            log_prob = torch.log_softmax(output.logits[0, at - 1], -1)[sample.input_ids[at]].item()
            assert of_values[place] == pytest.approx(g, abs=1e-6)
            assert of_log_probs[place] == pytest.approx(log_prob, abs=1e-5)


def sample_of(text: str, prompt_len: int) -> Sample:
    ids = np.array([*make_tokenizer()(text)["input_ids"], 257], dtype=np.int32)
    size = len(ids) - prompt_len
    mask = np.ones(size, dtype=np.int8)
    mask[0] = 0
    return Sample(ids, prompt_len, np.ones(size, np.int8), mask, np.arange(size, dtype=np.int32), 1, "7", None, "here")


def test_texts_of_tokens_join_to_the_answer_and_keep_characters_whole():
    """The tokenizer has a token a byte: é has two, the sign three."""
    prompt, texts = token_texts(sample_of("ab é√\n", 3), make_tokenizer())
    assert prompt == "ab " and texts == ["", "é", "", "", "√", "\n", "<|im_end|>"]
    assert token_texts(sample_of("é\ufffd", 0), make_tokenizer())[1] == ["", "é", "", "", "", "\ufffd<|im_end|>"]


def test_rows():
    sample = sample_of("abcd", 2)
    [row] = credit_rows([sample], make_tokenizer(), [[0.5, 0.25, 1.0]], [[-1.0, None, -2.0]], [[-0.5, -1.0, -4.0]])
    assert row["problem_id"] == "7" and row["prompt"] == "ab" and row["label"] == 1
    assert row["tokens"] == [
        {"text": "c", "step": 0, "label": None, "g": 0.5, "r": -0.5},
        {"text": "d", "step": 1, "label": 1, "g": 0.25, "r": None},
        {"text": "<|im_end|>", "step": 2, "label": 1, "g": 1.0, "r": 2.0},
    ]
    [row] = credit_rows([sample], make_tokenizer(), None, [[-1.0] * 3], [[-1.0] * 3])
    assert [token["g"] for token in row["tokens"]] == [None] * 3


@pytest.fixture
def trained(small_run, tmp_path):
    """A run, and ``credit(**flags)`` -> exit status and rows of the command on its own data."""
    words = small_run("out", **{"ckpt.save_steps": None, "ds.lora.rank": 2})
    rows = train("train_pipa", *words)
    given = dict(zip(words[::2], words[1::2]))

    def credit(**changes):
        output = tmp_path / "credit.jsonl"
        values = {
            "model.model_name_or_path": tmp_path / "out",
            "data.dataset": given["--data.dataset"],
            "data.annotation": "step",
            "ds.param_dtype": "fp32",
            "credit.output": output,
            **changes,
        }
        status = run_in_process("credit", *flags(values))
        return status, read_jsonl(output) if output.exists() else None

    return rows, credit, given


def test_command_scores_the_run_against_the_prior_that_it_had(trained, tmp_path, capsys):
    _, credit, given = trained
    prior = given["--prior.model_name_or_path"]
    assert prior_of(str(tmp_path / "out")) == prior
    status, rows = credit()
    assert status == 0 and rows and f"against {prior}" in capsys.readouterr().out
    tokens = [token for row in rows for token in row["tokens"]]
    assert all(0 < token["g"] < 1 for token in tokens if token["g"] is not None)
    assert max(abs(token["r"]) for token in tokens if token["r"] is not None) > 0.1
    # Against itself every log-ratio is 0.
    status, itself = credit(**{"credit.prior": tmp_path / "out"})
    assert status == 0 and {token["r"] for row in itself for token in row["tokens"]} <= {0.0, None}
    assert [[token["g"] for token in row["tokens"]] for row in itself] == [
        [token["g"] for token in row["tokens"]] for row in rows
    ]


def test_problems_are_chosen_by_name(trained, capsys):
    _, credit, _ = trained
    _, rows = credit()
    names = list(dict.fromkeys(row["problem_id"] for row in rows))
    assert len(names) > 1
    _, some = credit(**{"credit.problems": names[1:2]})
    assert {row["problem_id"] for row in some} == {names[1]}
    assert len(credit(**{"credit.max_answers": 2})[1]) == 2
    capsys.readouterr()
    status, _ = credit(**{"credit.problems": "nobody"})
    error = capsys.readouterr().err
    assert status == 1 and "--credit.problems 'nobody': no answer" in error and error.count("\n") == 1


def test_results_of_an_evaluation_are_answers_too(trained, tmp_path):
    _, credit, _ = trained
    rows = [
        {"problem_id": str(number), "question": "1+1?", "completion": "2", "right": bool(number), "answer": "2"}
        for number in range(2)
    ]
    columns = {"data.input_key": "question", "data.output_key": "completion", "data.label_key": "right"}
    changes = {"data.dataset": write_jsonl(tmp_path / "results.jsonl", rows), "data.annotation": None, **columns}
    status, found = credit(**changes, **{"credit.problems": "1"})
    assert status == 0
    [row] = found
    assert (row["problem_id"], row["prompt"], row["label"]) == ("1", "1+1?", 1)
    assert [(token["text"], token["label"]) for token in row["tokens"]] == [("2", 1), ("<|im_end|>", 1)]


def test_a_model_without_a_value_head_has_log_ratios_alone(trained, tmp_path, capsys):
    _, credit, _ = trained
    os.remove(tmp_path / "out" / "value_head.safetensors")
    status, rows = credit()
    assert status == 0 and {token["g"] for row in rows for token in row["tokens"]} == {None}
    assert "no value head" in capsys.readouterr().out


def test_refusals(trained, tmp_path, capsys):
    _, credit, given = trained
    args = tmp_path / "out" / "args.json"
    kept = args.read_text()
    capsys.readouterr()
    for changes, words in (
        ({"credit.output": None}, "--credit.output is required"),
        ({"credit.output": given["--data.dataset"]}, "is --data.dataset itself"),
        ({"credit.prior": "/nowhere"}, "--credit.prior /nowhere"),
        ({"model.model_name_or_path": "/nowhere"}, "--model.model_name_or_path /nowhere"),
    ):
        assert credit(**changes)[0] == 1
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    args.write_text(json.dumps({}))
    assert credit()[0] == 1 and "give --credit.prior" in capsys.readouterr().err
    args.write_text(kept)
