"""What counts by content, and what a run may go on with."""

import json
import shutil
import socket
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_tokenizer, run_in_process, run_module, train, write_jsonl

from pipa_openrlhf.data.render import fix_template_date
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.prior.cache import file_sha256
from pipa_openrlhf.training import identity
from pipa_openrlhf.training.identity import RunIdentity, Start

QUICK = {"train.max_epochs": 1, "ckpt.save_steps": None}
RESUME = "--ckpt.load_enable"


def refusal(capsys, words) -> str:
    capsys.readouterr()
    assert run_in_process("train_pipa", *words, RESUME) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    return line


def recognised(capsys, words) -> bool:
    capsys.readouterr()
    assert run_in_process("train_pipa", *words, RESUME) == 0
    return "already holds this run" in capsys.readouterr().out


@pytest.fixture
def moved(small_run, tiny_models, tmp_path):
    """``moved(**changes)`` -> flags of a run of which every input can be moved and edited."""
    for name in ("policy", "prior"):
        shutil.copytree(tiny_models / name, tmp_path / name)
    (tmp_path / "objective.py").write_text(
        "from pipa_openrlhf.objectives.table import objectives\n"
        "def make_objective(config):\n    return objectives()['pipa_n']\n"
    )

    def make(**changes) -> list[str]:
        return small_run(
            "out",
            **{
                **QUICK,
                "model.model_name_or_path": tmp_path / "policy",
                "prior.model_name_or_path": tmp_path / "prior",
                "pipa.objective_module": tmp_path / "objective.py",
                "pipa.variant": None,
                **changes,
            },
        )

    return make


def test_moved_inputs_are_the_same(moved, tmp_path, capsys):
    train("train_pipa", *moved())
    for name in ("policy", "prior", "objective.py", "data.jsonl"):
        shutil.move(tmp_path / name, tmp_path / f"moved_{name}")
    elsewhere = {
        "model.model_name_or_path": tmp_path / "moved_policy",
        "prior.model_name_or_path": tmp_path / "moved_prior",
        "pipa.objective_module": tmp_path / "moved_objective.py",
        "data.dataset": tmp_path / "moved_data.jsonl",
    }
    assert recognised(capsys, moved(**elsewhere))


def test_the_policy_itself_is_the_prior_that_is_not_named(moved, tmp_path, capsys):
    train("train_pipa", *moved(**{"prior.model_name_or_path": None}))
    assert recognised(capsys, moved(**{"prior.model_name_or_path": tmp_path / "policy"}))


def change_weights(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


EDITS = {
    "model": ("--model.model_name_or_path", lambda root: change_weights(root / "policy")),
    "prior": ("--prior.model_name_or_path", lambda root: change_weights(root / "prior")),
    "objective": ("--pipa.objective_module", lambda root: (root / "objective.py").open("a").write("# other\n")),
    "data": (
        "--data.dataset",
        lambda root: (root / "data.jsonl").write_text((root / "data.jsonl").read_text().replace("so ", "no ")),
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_edited_inputs_are_others(moved, tmp_path, capsys, what):
    train("train_pipa", *moved())
    flag, edit = EDITS[what]
    edit(tmp_path)
    line = refusal(capsys, moved())
    assert f"holds a run with {flag} " in line and " with other " in line


def test_going_on_with_everything_that_may_change(small_run, tmp_path):
    """Speed and bookkeeping change in the middle of a run; its losses do not."""
    whole = train("train_pipa", *small_run("whole", **{"ckpt.save_steps": None}))
    train("train_pipa", *small_run("part"))
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / "part" / "checkpoints" / f"global_step{step}")
    record = json.loads((tmp_path / "part" / "args.json").read_text())
    del record["resolved.finished"]
    (tmp_path / "part" / "args.json").write_text(json.dumps(record))
    changes = {
        "ds.zero_stage": 3,
        "train.micro_batch_size": 4,
        "train.fused_head": "false",
        "train.share_prefixes": "false",
        "ds.packing_samples": True,
        "model.gradient_checkpointing_enable": True,
        "ckpt.save_steps": 1,
        "ckpt.max_num": 1,
        "eval.dataset": tmp_path / "data.jsonl",
        "eval.steps": 2,
        "prior.cache_dir": tmp_path / "another cache",
        "logger.logging_steps": 2,
    }
    rows = train("train_pipa", *small_run("part", **changes), RESUME)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole], rel=1e-4)
    assert [row["lr"] for row in rows] == pytest.approx([row["lr"] for row in whole], rel=1e-9)


def test_more_epochs_follow_the_schedule_of_the_longer_run(small_run):
    longer = {"train.max_epochs": 3, "lr_warmup_ratio": 0.3}
    whole = train("train_pipa", *small_run("whole", **longer))
    train("train_pipa", *small_run("out", **{**longer, "train.max_epochs": 2}))
    rows = train("train_pipa", *small_run("out", **longer), RESUME)
    assert [row["lr"] for row in rows[6:]] == pytest.approx([row["lr"] for row in whole[6:]], rel=1e-9)
    assert rows[4]["lr"] != pytest.approx(whole[4]["lr"], rel=1e-3)


def test_fewer_epochs_and_more_without_a_checkpoint_are_refused(small_run, capsys):
    without = {"ckpt.save_steps": None}
    train("train_pipa", *small_run("out", **without))
    assert "--train.max_epochs 2, here 1" in refusal(capsys, small_run("out", **without, **{"train.max_epochs": 1}))
    line = refusal(capsys, small_run("out", **without, **{"train.max_epochs": 3}))
    assert "without a checkpoint" in line and "--train.max_epochs" in line


@pytest.mark.parametrize("file, of", [("args.json", "out"), ("checkpoints/global_step3/state.json", "global_step3")])
def test_a_run_of_an_older_version_is_refused(small_run, tmp_path, capsys, file, of):
    """It does not say what decided it."""
    words = small_run("out", **{"train.max_epochs": 1, "ckpt.save_steps": 3})
    train("train_pipa", *words)
    path = tmp_path / "out" / file
    record = json.loads(path.read_text())
    for older in ({"--train.seed": 42}, None):
        record["identity" if "identity" in record else "resolved.identity"] = older
        path.write_text(json.dumps(record))
        checksums = path.parent / "checksums.json"
        if checksums.exists():
            checksums.write_text(json.dumps({**json.loads(checksums.read_text()), path.name: file_sha256(path)}))
        line = refusal(capsys, words)
        assert of in line and "--ckpt.output_dir" in line


def test_two_ranks_are_refused_and_recognised_as_one(small_run, tmp_path):
    words = small_run("out", **QUICK)
    train("train_pipa", *words)
    result = run_module("train_pipa", *words, "--adam.lr", 0.5, RESUME, ranks=2)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 1 and len(lines) == 1 and "--adam.lr 0.01, here 0.5" in lines[0]


def test_the_node_with_other_data_is_named(monkeypatch):
    def gather(into, mine):
        into[:] = [mine, ("node1", "aaaa"), ("node2", "bbbb"), ("node1", "aaaa")][: len(into)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    strategy = SimpleNamespace(world_size=4)
    start = Start(RunIdentity({}, {}, {}, 1, "2026-01-02T00:00:00"))
    with pytest.raises(UserError) as error:
        start.with_data("aaaa", strategy)
    message = str(error.value)
    assert "rank 2 (node2)" in message and "node1" not in message and socket.gethostname() in message
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda into, mine: into.__setitem__(slice(None), [mine] * 4)
    )
    assert start.with_data("aaaa", strategy).identity.contents == {"--data.dataset": "aaaa"}


# The date that a chat template writes.

DATED = (
    "{% if not date is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}{{ date }}: "
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def test_templates_see_the_fixed_date(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED
    fix_template_date(tokenizer, "2024-02-29T23:59:58")
    message = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "29 Feb 2024: user hi<|im_end|>"
    # A caller's own argument still wins, and what is saved knows nothing of the date.
    assert tokenizer.apply_chat_template(message, tokenize=False, date="now") == "now: user hi<|im_end|>"
    tokenizer.save_pretrained(tmp_path)
    assert not any("2024" in path.read_text() for path in tmp_path.iterdir())


def test_a_run_that_is_resumed_tomorrow_has_the_same_data(small_run, tmp_path, monkeypatch, capsys):
    data = write_jsonl(
        tmp_path / "chat.jsonl",
        [{"prompt": [{"role": "user", "content": f"{n}"}], "completion": "yes", "label": n % 2} for n in range(8)],
    )
    changes = {
        "data.dataset": data,
        "data.annotation": None,
        "data.apply_chat_template": True,
        "data.tokenizer_chat_template": DATED,
    }

    def at(day: str) -> None:
        monkeypatch.setattr(identity, "datetime", SimpleNamespace(now=lambda: datetime.fromisoformat(day)))

    at("2026-01-31T12:00:00")
    train("train_pipa", *small_run("out", **changes, **{"train.max_epochs": 1, "ckpt.save_steps": 1}))
    at("2026-02-01T12:00:00")
    more = {**changes, "ckpt.save_steps": 1}
    assert len(train("train_pipa", *small_run("out", **more), RESUME)) == 4
    assert recognised(capsys, small_run("out", **more))
    train("train_pipa", *small_run("new", **changes))
    ids = [json.loads((tmp_path / name / "args.json").read_text())["resolved.identity"] for name in ("out", "new")]
    assert ids[0]["started"] == "2026-01-31T12:00:00" and ids[1]["started"] == "2026-02-01T12:00:00"
    assert ids[0]["contents"]["--data.dataset"] != ids[1]["contents"]["--data.dataset"]
