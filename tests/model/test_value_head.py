"""The value head: its start, the state that it reads, and its files."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import random_samples
from tiny import make_model

from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.policy import Policy, ValueHead, load_value_head, save_value_head


def test_g_is_one_half_everywhere_at_the_start():
    head = ValueHead(8, 5, torch.float32)
    assert not head(torch.randn(3, 4, 8)).any()
    assert sorted(name for name, _ in head.named_parameters()) == [
        "dense.bias",
        "dense.weight",
        "out.bias",
        "out.weight",
    ]
    assert head.dense.weight.shape == (5, 8)


@pytest.mark.parametrize("packed", [False, True])
def test_it_reads_the_state_that_predicts_the_token(packed):
    model = make_model(0)
    samples = random_samples([(4, 3), (2, 6)], 258)
    head = ValueHead(16, 16, torch.float32)
    torch.nn.init.normal_(head.out.weight)
    batch = collate(samples, None, 0, "packed" if packed else "padded")
    u = Policy(model, head)(batch).u
    for row, sample in zip(u, samples):
        ids = torch.tensor(sample.input_ids.astype("int64"))[None]
        states = model.model(ids).last_hidden_state[0]
        torch.testing.assert_close(
            row[: len(sample.labels)], head(states[sample.prompt_len - 1 : -1]), rtol=1e-4, atol=1e-5
        )


def test_output_is_float32_and_the_gradient_reaches_head_and_backbone():
    head = ValueHead(8, 8, torch.bfloat16)
    torch.nn.init.normal_(head.out.weight)
    hidden = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    u = head(hidden)
    assert u.dtype == torch.float32
    u.sum().backward()
    assert hidden.grad.any() and head.dense.weight.grad.any()


def save(folder, head: ValueHead) -> None:
    save_value_head(str(folder), head.state_dict())


def test_saved_head_is_loaded(tmp_path):
    head = ValueHead(8, 5, torch.float32)
    torch.nn.init.normal_(head.out.weight)
    save(tmp_path, head)
    loaded = load_value_head(str(tmp_path), torch.float32)
    hidden = torch.randn(4, 8)
    assert torch.equal(loaded(hidden), head(hidden))
    assert load_value_head(str(tmp_path), torch.bfloat16).dense.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "damage", ["no weights", "no config", "other keys", "other sizes", "torn weights", "torn config", "other config"]
)
def test_wrong_files_are_refused(tmp_path, damage):
    save(tmp_path, ValueHead(8, 5, torch.float32))
    weights, config = tmp_path / "value_head.safetensors", tmp_path / "value_head_config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "no config":
        config.unlink()
    elif damage == "other keys":
        save_file({f"x.{name}": tensor for name, tensor in load_file(weights).items()}, weights)
    elif damage == "other sizes":
        other = tmp_path / "other"
        other.mkdir()
        save(other, ValueHead(8, 6, torch.float32))
        shutil.copy(other / weights.name, weights)
    elif damage == "torn weights":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "torn config":
        config.write_text("{")
    else:
        config.write_text("{}")
    with pytest.raises(UserError) as error:
        load_value_head(str(tmp_path), torch.float32)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
