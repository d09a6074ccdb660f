"""--model.aux_loss_coef adds the model's own MoE balancing loss, as OpenRLHF's train_dpo does."""

import pytest
import torch
from openrlhf.utils.distributed_sampler import DistributedSampler
from reference import EOS, ids
from tiny import flags, make_tokenizer, run_in_process, train, write_jsonl
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

PAIRS = [
    {"prompt": "1+1?\n", "chosen": "2", "rejected": "it is 3"},
    {"prompt": "What is your name?", "chosen": "Bo", "rejected": "x"},
    {"prompt": "Q ", "chosen": "yes, it is so", "rejected": "no"},
]
COMMON = {
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
    "bos_token_id": None,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **COMMON))


def qwen2_moe():
    sizes = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(num_experts=4, num_experts_per_tok=2, **sizes, **COMMON))


@pytest.fixture(scope="module", params=[mixtral, qwen2_moe])
def moe(request, tmp_path_factory):
    """Folder of a tiny mixture of experts."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param.__name__)
    request.param().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def balancing_loss(folder, pairs=PAIRS) -> float:
    """The model's own aux_loss on the padded batch of the answers of ``pairs``."""
    sequences = [ids(row["prompt"] + row[key]) + [EOS] for row in pairs for key in ("chosen", "rejected")]
    width = max(map(len, sequences))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output = model(
        input_ids=torch.tensor([row + [EOS] * (width - len(row)) for row in sequences]),
        attention_mask=torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sequences]),
        output_router_logits=True,
    )
    return output.aux_loss.item()


def first_step(module, folder, tmp_path, **changes) -> dict:
    values = {
        "model.model_name_or_path": folder,
        "prior.cache_dir": tmp_path / "cache",
        "data.dataset": write_jsonl(tmp_path / "pairs.jsonl", PAIRS),
        "ds.param_dtype": "fp32",
        "train.batch_size": 6,
        "train.micro_batch_size": 6,
        "ckpt.output_dir": tmp_path / "run",
        "ckpt.overwrite": True,
        **changes,
    }
    return train(module, *flags(values))[0]


@pytest.mark.parametrize("module", ["train_dpo", "train_pipa"])
def test_the_models_own_balancing_loss_is_added(moe, tmp_path, module):
    whole = {"train.group_by_length": "false"}  # cut by size, the six answers would not be one micro-batch
    without = first_step(module, moe, tmp_path, **whole)
    with_term = first_step(module, moe, tmp_path, **whole, **{"model.aux_loss_coef": 10})
    expected = balancing_loss(moe)
    assert expected > 1
    assert with_term["loss"] - without["loss"] == pytest.approx(10 * expected, rel=1e-4)
    assert with_term["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-3)


def test_it_is_the_mean_over_micro_batches_weighted_by_their_answers(moe, tmp_path):
    """It is no sum over tokens, so it depends on how the batch is cut: here into two pairs and one."""
    changes = {"train.group_by_length": "false", "train.micro_batch_size": 2}
    without = first_step("train_dpo", moe, tmp_path, **changes)
    with_term = first_step("train_dpo", moe, tmp_path, **changes, **{"model.aux_loss_coef": 10})
    order = [PAIRS[index] for index in DistributedSampler(range(3), num_replicas=1, rank=0, shuffle=True, seed=42)]
    first, second = balancing_loss(moe, order[:2]), balancing_loss(moe, order[2:])
    assert first != pytest.approx(second, rel=1e-3)
    assert with_term["loss"] - without["loss"] == pytest.approx(10 * (2 * first + second) / 3, rel=1e-4)


def test_refused_on_a_dense_model(tiny_models, tmp_path, capsys):
    words = flags(
        {
            "model.model_name_or_path": tiny_models / "policy",
            "prior.cache_dir": tmp_path / "cache",
            "data.dataset": write_jsonl(tmp_path / "pairs.jsonl", PAIRS),
            "ds.param_dtype": "fp32",
            "model.aux_loss_coef": 0.01,
            "ckpt.output_dir": tmp_path / "run",
        }
    )
    assert run_in_process("train_dpo", *words) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "--model.aux_loss_coef balances experts, and this model has none" in line
