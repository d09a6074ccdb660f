"""g wherever it is asked for, against arithmetic by hand and against what training reads."""

import numpy as np
import pytest
import torch
from samples import random_samples
from tiny import make_model, save_adapter, train

from pipa_openrlhf.data.batch import collate
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.loading import load_causal_lm
from pipa_openrlhf.model.policy import Policy, ValueHead, load_value_head, save_value_head
from pipa_openrlhf.model.value_model import ValueModel, head_digest, load_value_model

SEQUENCES = [[5, 9, 200, 31], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [44, 45]]


def make_head(seed: int = 0) -> ValueHead:
    torch.manual_seed(seed)
    head = ValueHead(16, 12, torch.float32)
    torch.nn.init.normal_(head.out.weight)
    torch.nn.init.normal_(head.out.bias)
    return head


def by_hand(model, head: ValueHead, sequence: list[int]) -> np.ndarray:
    """g after each token, in float64, the sequence alone and the head written out."""
    with torch.no_grad():
        hidden = model.double().model(torch.tensor([sequence])).last_hidden_state[0].numpy()
    model.float()
    weights = {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}
    inner = np.maximum(hidden @ weights["dense.weight"].T + weights["dense.bias"], 0)
    u = inner @ weights["out.weight"][0] + weights["out.bias"][0]
    return 1 / (1 + np.exp(-u))


@pytest.mark.parametrize("tokens_at_once", [1, 9, 10_000])
def test_g_is_the_sigmoid_of_the_head_on_the_state_after_a_token(tokens_at_once):
    model, head = make_model(0), make_head()
    expected = [by_hand(model, head, sequence) for sequence in SEQUENCES]
    value_model = ValueModel(model, head, tokens_at_once)
    for found, wanted in zip(value_model.token_values(SEQUENCES), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)
    np.testing.assert_allclose(value_model.values(SEQUENCES), [wanted[-1] for wanted in expected], atol=2e-6)
    assert np.ptp(np.concatenate(expected)) > 0.2, "or the test could not tell one state from another"


def test_it_is_what_training_reads_at_the_token_that_follows():
    model, head = make_model(0), make_head()
    samples = random_samples([(4, 3), (2, 6)], 258)
    u = Policy(model, head)(collate(samples, None, 0, "padded")).u
    found = ValueModel(model, head).token_values([sample.input_ids.tolist() for sample in samples])
    for row, sample, values in zip(u.detach(), samples, found):
        count = len(sample.labels)
        np.testing.assert_allclose(
            values[sample.prompt_len - 1 : -1], torch.sigmoid(row[:count]).numpy(), rtol=1e-4, atol=1e-6
        )
        assert len(values) == sample.prompt_len + count  # and one more, after the last token


def test_nothing_has_no_state():
    with pytest.raises(ValueError, match="without tokens"):
        ValueModel(make_model(0), make_head()).values([[1], []])


def test_the_head_of_a_model_in_bf16_computes_in_float32():
    model, head = make_model(0).to(torch.bfloat16), make_head()
    [values] = ValueModel(model, head).token_values(SEQUENCES[:1])
    with torch.no_grad():
        hidden = model.model(torch.tensor(SEQUENCES[:1])).last_hidden_state[0]
        expected = torch.sigmoid(head.double()(hidden.double()))
    np.testing.assert_allclose(values, expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_an_exported_model_has_the_values_of_the_model_that_was_trained(small_run, tmp_path, rank):
    train("train_pipa", *small_run("run", **{"train.max_epochs": 1, "ds.lora.rank": rank, "value.lr": 0.05}))
    folder = str(tmp_path / "run")
    model = load_causal_lm(folder, torch.float32, "sdpa")
    head = load_value_head(folder, torch.float32)
    assert head.out.weight.abs().max() > 0.01
    found = load_value_model(folder, torch.float32).token_values(SEQUENCES)
    for values, sequence in zip(found, SEQUENCES):
        np.testing.assert_allclose(values, by_hand(model, head, sequence), atol=2e-6)


def test_adapter_and_base(tiny_models, tmp_path):
    adapted = save_adapter(tiny_models / "policy", tmp_path, seed=1)
    head = make_head()
    save_value_head(str(tmp_path), head.state_dict())
    found = load_value_model(str(tmp_path), torch.float32).token_values(SEQUENCES)
    for values, sequence in zip(found, SEQUENCES):
        np.testing.assert_allclose(values, by_hand(adapted.get_base_model(), head, sequence), atol=2e-5)


def test_a_head_that_is_missing_or_of_another_model_is_refused(tiny_models, tmp_path):
    folder = str(tiny_models / "policy")
    for call in (head_digest, lambda one: load_value_model(one, torch.float32)):
        with pytest.raises(UserError, match="no value head in"):
            call(folder)
    make_model(0).save_pretrained(tmp_path)
    save_value_head(str(tmp_path), ValueHead(8, 5, torch.float32).state_dict())
    with pytest.raises(UserError, match="made for hidden size 8, the model has 16"):
        load_value_model(str(tmp_path), torch.float32)


def test_the_digest_tells_heads_apart(tmp_path):
    digests = set()
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(digests))
        folder.mkdir(exist_ok=True)
        save_value_head(str(folder), make_head(seed).state_dict())
        digests.add(head_digest(str(folder)))
    assert len(digests) == 2
