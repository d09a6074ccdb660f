"""The columns of OpenRLHF 0.9's KTO data, and its flags' new names."""

import pytest
import reference
from reference import mismatch_ratios, reference_point, scored
from tiny import flags, run_in_process, train, write_jsonl

from pipa_openrlhf.cli.flags import RENAMED, build_parser, parse
from pipa_openrlhf.errors import UserError

ROWS = [("1+1?\n", "hm", 1), ("Q ", "so 2", 0), ("2+2=\n", "I am Bo", 1)]


@pytest.fixture
def run_flags(tiny_models, tmp_path):
    def make(rows, output="run", **changes) -> list[str]:
        return flags(
            {
                "model.model_name_or_path": tiny_models / "policy",
                "prior.model_name_or_path": tiny_models / "prior",
                "prior.cache_dir": tmp_path / "cache",
                "data.dataset": write_jsonl(tmp_path / f"{output}.jsonl", rows),
                "ds.param_dtype": "fp32",
                "train.batch_size": len(rows),
                "ckpt.output_dir": tmp_path / output,
                **changes,
            }
        )

    return make


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_text_columns(tiny_models, run_flags):
    rows = [{"input": prompt, "output": answer, "score": label} for prompt, answer, label in ROWS]
    keys = {"data.input_key": "input", "data.output_key": "output", "data.label_key": "score"}
    [row] = train("train_kto", *run_flags(rows, **keys))
    answers = [scored(tiny_models, prompt, [answer], [label], "answer") for prompt, answer, label in ROWS]
    z0 = reference_point(mismatch_ratios(tiny_models, answers))
    assert row["kl"] == pytest.approx(z0, rel=1e-4)
    assert row["loss"] == pytest.approx(reference.kto(answers, z0), rel=1e-4)


def test_conversations_whole_or_in_two_columns_are_the_same_data(run_flags):
    """OpenRLHF puts the answer's messages into the output column, or at the end of the input column."""
    chat = {"data.apply_chat_template": True, "data.input_key": "messages"}
    whole = [{"messages": [user(prompt), assistant(answer)], "label": label} for prompt, answer, label in ROWS]
    [one] = train("train_kto", *run_flags(whole, "whole", **chat))
    split = [
        {"messages": [user(prompt)], "reply": [assistant(answer)], "label": label} for prompt, answer, label in ROWS
    ]
    [two] = train("train_kto", *run_flags(split, "split", **chat, **{"data.output_key": "reply"}))
    plain = [{"prompt": [user(p)], "completion": [assistant(a)], "label": bool(label)} for p, a, label in ROWS]
    [three] = train("train_kto", *run_flags(plain, "plain", **{"data.apply_chat_template": True}))
    for metric in ("loss", "kl", "logps/chosen", "logps/rejected", "num_tokens"):
        assert one[metric] == two[metric] == three[metric]


def test_problem_ids_are_kept(run_flags):
    """Answers of one problem are no mismatches of each other, whatever their prompts."""
    rows = [{"q": prompt, "a": answer, "label": label, "problem_id": "one"} for prompt, answer, label in ROWS]
    [row] = train("train_kto", *run_flags(rows, **{"data.input_key": "q", "data.output_key": "a"}))
    assert row["kl"] == 0.0


@pytest.mark.parametrize(
    "row, keys, message",
    [
        (
            {"q": "a", "label": 1},
            {"data.input_key": "q", "data.output_key": "a"},
            "no column 'a', which --data.output_key",
        ),
        (
            {"q": "a", "a": "b"},
            {"data.input_key": "q", "data.output_key": "a"},
            "no column 'label', which --data.label_key",
        ),
        ({"q": "a", "label": 1}, {"data.input_key": "input", "data.output_key": "a"}, "no column 'input'"),
        ({"q": "a", "label": 1}, {"data.input_key": "q"}, "give --data.output_key for the answer"),
        ({"q": "a", "label": 1}, {"data.output_key": "q"}, "--data.output_key needs --data.input_key"),
        ({"q": "a", "a": "b", "label": "fine"}, {"data.input_key": "q", "data.output_key": "a"}, "'label' is 'fine'"),
    ],
)
def test_refusals_name_the_row_and_the_flag(run_flags, capsys, row, keys, message):
    assert run_in_process("train_kto", *run_flags([row], **keys)) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert "run.jsonl line 1" in line or "--data.output_key needs" in line


@pytest.mark.parametrize(
    "module, old, new",
    [
        ("train_kto", "--desirable_loss_weight", "--kto.desirable_weight"),
        ("train_kto", "--input_key", "--data.input_key"),
        ("train_kto", "--pretrain", "--model.model_name_or_path"),
        ("train_kto", "--beta=0.01", "--model.beta"),
        ("train_dpo", "--ipo", "--model.ipo_enable"),
        ("train_dpo", "--chosen_key", "--data.chosen_key"),
    ],
)
def test_old_flags_are_answered_with_their_new_names(module, old, new):
    with pytest.raises(UserError, match=f"{old.split('=')[0]}.* of OpenRLHF before 0.10.2 is called {new} here"):
        parse(module, ["--data.dataset", "x", old, "1"])


def test_all_old_flags_of_a_script_are_answered_at_once():
    old = [
        "--pretrain",
        "m",
        "--max_norm",
        "1.0",
        "--train_batch_size",
        "4",
        "--learning_rate=1e-5",
        "--packing_samples",
        "--disable_trace_cache",
    ]
    with pytest.raises(UserError) as refused:
        parse("train_kto", ["--data.dataset", "x", *old])
    assert str(refused.value).split("; ") == [
        "--pretrain of OpenRLHF before 0.10.2 is called --model.model_name_or_path here",
        "--train_batch_size of OpenRLHF before 0.10.2 is called --train.batch_size here",
        "--learning_rate of OpenRLHF before 0.10.2 is called --adam.lr here",
        "--packing_samples of OpenRLHF before 0.10.2 is called --ds.packing_samples here",
        "--disable_trace_cache is unknown",
    ]


def test_every_new_name_is_a_flag_of_its_module():
    known = {name for module in ("train_dpo", "train_kto") for name in build_parser(module)._option_string_actions}
    assert {f"--{name}" for name in RENAMED.values()} <= known
