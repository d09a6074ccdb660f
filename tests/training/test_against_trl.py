"""Loss, rewards and per-sequence log-probs of whole runs against TRL's own trainers, where TRL is installed."""

import pytest
import reference
import torch
from reference import BETA, mean, mismatch_ratios, scored
from tiny import flags, make_model, make_tokenizer, train, write_jsonl

from pipa_openrlhf.model.output_head import chunked_log_probs

trl = pytest.importorskip("trl", reason="TRL is not installed", exc_type=ImportError)

PAIRED = [
    {"prompt": "1+1?\n", "chosen": "a=2", "rejected": "so 3"},
    {"prompt": "Q ", "chosen": "so", "rejected": "no, not at all"},
    {"prompt": "What is your name?", "chosen": "I am Bo", "rejected": "Al"},
]
SINGLE = [
    {"prompt": "1+1?\n", "completion": "hm", "label": True},
    {"prompt": "Q ", "completion": "so 2", "label": False},
    {"prompt": "What is your name?", "completion": "I am Bo", "label": True},
    {"prompt": "2+2=\n", "completion": "F", "label": False},
]


@pytest.fixture
def first_batch(tmp_path):
    """``first_batch(kind, rows, **config)``: (loss, metrics) of TRL's trainer on all of ``rows``."""
    from datasets import Dataset

    def compute(kind, rows, **config):
        trainer_class, config_class = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
        trainer = trainer_class(
            model=make_model(0),
            ref_model=make_model(1),
            args=config_class(
                output_dir=str(tmp_path / "trl"),
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=len(rows),
                beta=BETA,
                max_length=64,
                **config,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=make_tokenizer(),
        )
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
        return loss.item(), {name: values[0] for name, values in trainer._metrics["train"].items()}

    return compute


@pytest.fixture
def our_first_step(tiny_models, tmp_path):
    """``our_first_step(module, rows, **{"flag": value})``: our metrics of the same batch."""

    def compute(module, rows, **changes):
        values = {
            "model.model_name_or_path": tiny_models / "policy",
            "prior.model_name_or_path": tiny_models / "prior",
            "prior.cache_dir": tmp_path / "cache",
            "data.dataset": write_jsonl(tmp_path / "rows.jsonl", rows),
            "ds.param_dtype": "fp32",
            "train.batch_size": len(rows),
            "train.micro_batch_size": 2,
            "ckpt.output_dir": tmp_path / "ours",
            "ckpt.overwrite": True,
            **changes,
        }
        return train(module, *flags(values))[0]

    return compute


def answers_of(models, rows, key, label=None) -> list[reference.Scored]:
    return [
        scored(models, row["prompt"], [row[key]], [int(row["label"] if label is None else label)], "answer")
        for row in rows
    ]


def assert_same_metrics(ours: dict, theirs: dict):
    for metric in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4), metric


def test_dpo(first_batch, our_first_step):
    loss, metrics = first_batch("DPO", PAIRED)
    ours = our_first_step("train_dpo", PAIRED)
    assert ours["loss"] == pytest.approx(loss, rel=1e-4)
    assert_same_metrics(ours, metrics)
    assert ours["rewards/accuracies"] == pytest.approx(metrics["rewards/accuracies"])


def test_ipo_differs_by_trls_length_normalisation_alone(tiny_models, first_batch, our_first_step):
    loss, metrics = first_batch("DPO", PAIRED, loss_type="ipo")
    pairs = list(zip(answers_of(tiny_models, PAIRED, "chosen", 1), answers_of(tiny_models, PAIRED, "rejected", 0)))
    per_token = [mean(chosen.r) - mean(rejected.r) for chosen, rejected in pairs]
    assert loss == pytest.approx(mean((margin - 1 / (2 * BETA)) ** 2 for margin in per_token), rel=1e-4)
    ours = our_first_step("train_dpo", PAIRED, **{"model.ipo_enable": True})
    by_sum = [chosen.R - rejected.R for chosen, rejected in pairs]
    assert ours["loss"] == pytest.approx(mean((margin - 1 / (2 * BETA)) ** 2 for margin in by_sum), rel=1e-4)
    assert_same_metrics(ours, metrics)


def test_trl_ignores_label_smoothing_in_dpo(first_batch):
    assert first_batch("DPO", PAIRED, label_smoothing=0.2)[0] == pytest.approx(first_batch("DPO", PAIRED)[0])


def test_trls_sft_term_is_a_mean_over_the_batchs_tokens(tiny_models, first_batch, our_first_step):
    """OpenRLHF's, and so ours, is a mean over each answer's tokens, then over answers."""
    both, _ = first_batch("DPO", PAIRED, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0])
    chosen = answers_of(tiny_models, PAIRED, "chosen", 1)
    tokens = [log_f for one in chosen for log_f in one.log_f]
    ours = our_first_step("train_dpo", PAIRED, **{"model.nll_loss_coef": 1.0})
    assert ours["loss"] - reference.chosen_nll(chosen) == pytest.approx(both + mean(tokens), rel=1e-4)


def test_kto_where_both_pair_prompts_and_answers_alike(first_batch, our_first_step):
    """With two records, TRL's shift backwards and ours forwards make the same mismatches."""
    loss, metrics = first_batch("KTO", SINGLE[:2], desirable_weight=1.5, undesirable_weight=0.5)
    weights = {"kto.desirable_weight": 1.5, "kto.undesirable_weight": 0.5}
    ours = our_first_step("train_kto", SINGLE[:2], **weights)
    assert ours["kl"] > 0.1
    assert ours["kl"] == pytest.approx(metrics["kl"], rel=1e-4)
    assert ours["loss"] == pytest.approx(loss, rel=1e-4)
    assert_same_metrics(ours, metrics)


def test_kto_differs_by_the_mismatches_alone(tiny_models, first_batch, our_first_step):
    """TRL gives record i the answer of record i - 1 of its micro-batch; with TRL's kl our formula is TRL's loss."""
    loss, metrics = first_batch("KTO", SINGLE)
    ours = our_first_step("train_kto", SINGLE)
    answers = answers_of(tiny_models, SINGLE, "completion")
    assert loss == pytest.approx(reference.kto(answers, metrics["kl"]), rel=1e-4)
    assert ours["loss"] == pytest.approx(reference.kto(answers, ours["kl"]), rel=1e-4)
    # Backwards, the next record's answer is the one before.
    backwards = mean(mismatch_ratios(tiny_models, answers[::-1]))
    assert metrics["kl"] == pytest.approx(max(0.0, backwards), rel=1e-4)
    assert ours["kl"] == pytest.approx(max(0.0, mean(mismatch_ratios(tiny_models, answers))), rel=1e-4)
    assert ours["kl"] != pytest.approx(metrics["kl"], rel=1e-2)


def test_token_log_probs():
    from trl.trainer.utils import selective_log_softmax

    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(7, 4), torch.randn(11, 4), torch.randint(11, (7,))
    ours = chunked_log_probs(hidden, targets, lambda part: part @ weight.T, (weight,), 3)
    torch.testing.assert_close(ours, selective_log_softmax((hidden @ weight.T)[None], targets[None])[0])
