"""The first loss and metrics of every baseline in real training runs, against METHOD's formulas by hand."""

import pytest
import reference
from openrlhf.utils.distributed_sampler import DistributedSampler
from reference import BETA, answer_metrics, mismatch_ratios, reference_point, scored
from tiny import flags, run_in_process, train, write_jsonl

# Four problems, each with a right and a wrong answer. The last one's prompt is the longest.
PAIRS = [
    ("1+1?\n", ["a=2", "so 2"], ["a=3", "so 3"], [1, 0]),
    ("2+2=\n", ["hm"], ["it is", "5"], [1, 0]),
    ("Q ", ["x", "so", "zz"], ["x", "n", "no"], [1, 0, 0]),
    ("What is your name?", ["I am Bo"], ["My name", "is not for you"], [1, 0]),
]
PAIRED = [
    {"prompt": prompt, "chosen": right, "rejected": wrong, "rejected_labels": labels}
    for prompt, right, wrong, labels in PAIRS
]
UNPAIRED = [
    {"prompt": prompt, "completions": steps, "labels": [bool(label) for label in labels]}
    for prompt, right, wrong, wrong_labels in PAIRS
    for steps, labels in ((right, [1] * len(right)), (wrong, wrong_labels))
]


@pytest.fixture(scope="module")
def answers(tiny_models):
    """Scored answers by annotation: right, wrong, right, wrong, ..."""
    return {
        annotation: [
            scored(tiny_models, prompt, steps, labels, annotation)
            for prompt, right, wrong, wrong_labels in PAIRS
            for steps, labels in ((right, [1] * len(right)), (wrong, wrong_labels))
        ]
        for annotation in ("answer", "step")
    }


@pytest.fixture(scope="module")
def z0(tiny_models, answers):
    return reference_point(mismatch_ratios(tiny_models, answers["answer"]))


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("prior_cache")


@pytest.fixture
def run_flags(tiny_models, cache_dir, tmp_path):
    """``run_flags(rows, output, **{"flag": value})``: flags of a run whose first batch is all of ``rows``."""

    def make(rows, output, **changes) -> list[str]:
        return flags(
            {
                "model.model_name_or_path": tiny_models / "policy",
                "prior.model_name_or_path": tiny_models / "prior",
                "prior.cache_dir": cache_dir,
                "data.dataset": write_jsonl(tmp_path / f"{output}.jsonl", rows),
                "ds.param_dtype": "fp32",
                "train.batch_size": len(rows),
                "train.micro_batch_size": len(rows),
                "lr_warmup_ratio": 0,
                "ckpt.output_dir": tmp_path / output,
                **changes,
            }
        )

    return make


def test_the_reference_point_is_one_that_matters(z0):
    """Were it clamped to 0 the tests below would not see how it is estimated."""
    assert z0 > 0.05


def test_the_reference_point_is_at_least_zero(tiny_models, run_flags, tmp_path):
    """With policy and prior exchanged, mismatches have a negative mean log-ratio."""
    models = tmp_path / "exchanged"
    models.mkdir()
    (models / "policy").symlink_to(tiny_models / "prior")
    (models / "prior").symlink_to(tiny_models / "policy")
    ours = [
        scored(models, prompt, steps, labels, "answer")
        for prompt, right, wrong, wrong_labels in PAIRS
        for steps, labels in ((right, [1] * len(right)), (wrong, wrong_labels))
    ]
    ratios = mismatch_ratios(models, ours)
    assert reference.mean(ratios) < -0.05
    exchanged = {"model.model_name_or_path": models / "policy", "prior.model_name_or_path": models / "prior"}
    [row] = train("train_kto", *run_flags(UNPAIRED, "run", **exchanged))
    assert row["kl"] == 0.0
    assert row["loss"] == pytest.approx(reference.kto(ours, 0.0), rel=1e-4)
    assert row["loss"] != pytest.approx(reference.kto(ours, reference.mean(ratios)), rel=1e-3)


# name, module, flags, loss by hand from (answers, z0).
CASES = [
    ("dpo", "train_dpo", {}, lambda a, z: reference.dpo(a)),
    ("dpo_packed", "train_dpo", {"ds.packing_samples": True}, lambda a, z: reference.dpo(a)),
    ("smoothed", "train_dpo", {"model.label_smoothing": 0.2}, lambda a, z: reference.dpo(a, smoothing=0.2)),
    ("ipo", "train_dpo", {"model.ipo_enable": True}, lambda a, z: reference.ipo(a)),
    (
        "dpo_nll",
        "train_dpo",
        {"model.nll_loss_coef": 0.5},
        lambda a, z: reference.dpo(a) + 0.5 * reference.chosen_nll(a),
    ),
    ("step_dpo_l1", "train_dpo", {"data.annotation": "step"}, lambda a, z: reference.dpo(a)),
    (
        "step_dpo_l0",
        "train_dpo",
        {"data.annotation": "step", "dpo.step_loss": "l0"},
        lambda a, z: reference.dpo(a, step_loss="l0"),
    ),
    ("kto", "train_kto", {}, lambda a, z: reference.kto(a, z)),
    ("kto_packed", "train_kto", {"ds.packing_samples": True}, lambda a, z: reference.kto(a, z)),
    (
        "kto_weights",
        "train_kto",
        {"kto.desirable_weight": 1.5, "kto.undesirable_weight": 0.25},
        lambda a, z: reference.kto(a, z, (1.5, 0.25)),
    ),
    ("kto_sft", "train_kto", {"kto.sft_coef": 0.5}, lambda a, z: reference.kto(a, z) + 0.5 * reference.sft_term(a)),
    ("step_kto_l1", "train_kto", {"data.annotation": "step"}, lambda a, z: reference.kto(a, z)),
    (
        "step_kto_per_step",
        "train_kto",
        {"data.annotation": "step", "kto.step_loss": "per_step"},
        lambda a, z: reference.step_kto(a, z),
    ),
    (
        "step_kto_sft",
        "train_kto",
        {"data.annotation": "step", "kto.sft_coef": 0.5},
        lambda a, z: reference.kto(a, z) + 0.5 * reference.sft_term(a),
    ),
]


@pytest.mark.parametrize("name, module, changes, loss_by_hand", CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("form", ["paired", "single"])
def test_first_loss_and_metrics_equal_the_formula(answers, z0, run_flags, name, module, changes, loss_by_hand, form):
    """Pairs feed KTO as single answers; single answers feed DPO with --data.pairing match."""
    ours = answers[changes.get("data.annotation", "answer")]
    if module == "train_dpo":
        rows, sizes = (PAIRED if form == "paired" else UNPAIRED), (1, 3, 4)
        changes = {"train.batch_size": 4, **({} if form == "paired" else {"data.pairing": "match"}), **changes}
    else:
        rows, sizes = (PAIRED if form == "paired" else UNPAIRED), (1, 3, 8)
        changes = {"train.batch_size": 8, **changes}
    runs = []
    for size in sizes:
        [row] = train(module, *run_flags(rows, f"micro{size}", **{**changes, "train.micro_batch_size": size}))
        assert row["loss"] == pytest.approx(loss_by_hand(ours, z0), rel=1e-4)
        for metric, value in answer_metrics(ours, BETA).items():
            assert row[metric] == pytest.approx(value, rel=1e-4), metric
        assert row.get("kl") == (pytest.approx(z0, rel=1e-4) if module == "train_kto" else None)
        in_order = [chosen.R > rejected.R for chosen, rejected in reference.pairs_of(ours)]
        assert row.get("rewards/accuracies") == (sum(in_order) / 4 if module == "train_dpo" else None)
        runs.append(row)
    for row in runs[1:]:
        assert row["grad_norm"] == pytest.approx(runs[0]["grad_norm"], rel=1e-4)
        assert row["loss"] == pytest.approx(runs[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("variant, annotation", [("m", "answer"), ("n", "step")])
def test_the_sft_term_is_added_to_pipas_loss(answers, run_flags, variant, annotation):
    changes = {"pipa.variant": variant, "data.annotation": annotation, "train.micro_batch_size": 3}
    without, with_term = (
        train("train_pipa", *run_flags(UNPAIRED, f"coef{coef}", **{**changes, "pipa.sft_coef": coef}))[0]
        for coef in (0, 0.5)
    )
    term = reference.sft_term(answers[annotation])
    assert with_term["loss"] == pytest.approx(without["loss"] + 0.5 * term, rel=1e-5)
    assert with_term["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-3)


def test_the_sft_term_is_the_mean_over_the_answers_that_have_right_tokens(tiny_models, run_flags):
    """Wrong answers with no right token neither add to it nor count."""
    rows = [UNPAIRED[0], UNPAIRED[3], UNPAIRED[7]]
    ours = [
        scored(tiny_models, row["prompt"], row["completions"], [int(c) for c in row["labels"]], "answer")
        for row in rows
    ]
    z0 = reference_point(mismatch_ratios(tiny_models, ours))
    [row] = train("train_kto", *run_flags(rows, "run", **{"kto.sft_coef": 1.0, "train.micro_batch_size": 1}))
    assert row["loss"] == pytest.approx(reference.kto(ours, z0) - reference.mean(ours[0].log_f), rel=1e-4)


def test_batches_and_the_last_partial_one_have_their_own_reference_point(tiny_models, answers, run_flags):
    """Three answers a batch, then two; mismatches are fixed by the data set, z0 is the mean over the batch's own."""
    ours = answers["answer"]
    ratios = mismatch_ratios(tiny_models, ours)
    order = list(DistributedSampler(range(8), num_replicas=1, rank=0, shuffle=True, seed=42))
    # With a learning rate of zero every batch meets the model that the formulas use.
    changes = {"train.batch_size": 3, "train.micro_batch_size": 2, "train.group_by_length": "false", "adam.lr": 0}
    rows = train("train_kto", *run_flags(UNPAIRED, "run", **changes))
    assert len(rows) == 3
    for row, members in zip(rows, (order[:3], order[3:6], order[6:])):
        z0 = reference_point([ratios[index] for index in members])
        assert row["kl"] == pytest.approx(z0, rel=1e-4)
        assert row["loss"] == pytest.approx(reference.kto([ours[index] for index in members], z0), rel=1e-4)


def test_the_last_partial_batch_of_pairs_is_a_mean_over_its_own_pairs(answers, run_flags):
    changes = {"train.batch_size": 3, "train.micro_batch_size": 2, "adam.lr": 0}
    rows = train("train_dpo", *run_flags(PAIRED, "run", **changes))
    assert len(rows) == 2
    assert (3 * rows[0]["loss"] + rows[1]["loss"]) / 4 == pytest.approx(reference.dpo(answers["answer"]), rel=1e-4)


@pytest.mark.parametrize("module, rows", [("train_dpo", PAIRED), ("train_kto", UNPAIRED)])
def test_evaluation_is_the_same_loss_with_a_reference_point_of_its_own(answers, z0, run_flags, tmp_path, module, rows):
    """On the training data, with a model that does not move, the evaluation repeats the training step."""
    data = write_jsonl(tmp_path / "held_out.jsonl", rows)
    changes = {"eval.dataset": data, "adam.lr": 0, "train.micro_batch_size": 3}
    [row] = train(module, *run_flags(rows, "run", **changes))
    names = [name for name in row if f"eval/{name}" in row]
    assert {"loss", "rewards/margins", "logps/chosen"} <= set(names) and ("kl" in names) == (module == "train_kto")
    for name in names:
        assert row[f"eval/{name}"] == pytest.approx(row[name], rel=1e-5), name


def test_single_answers_are_not_matched_into_pairs_unasked(run_flags, capsys):
    assert run_in_process("train_dpo", *run_flags(UNPAIRED, "run")) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "holds single answers" in line and "--data.pairing match" in line


def test_saying_unpaired_does_not_make_dpo_match_single_answers(run_flags, capsys):
    assert run_in_process("train_dpo", *run_flags(UNPAIRED, "run", **{"data.pairing": "auto"})) == 1
    assert "--data.pairing match" in capsys.readouterr().err


def test_answers_of_one_problem_have_no_mismatch_and_z0_is_zero(tiny_models, run_flags):
    rows = UNPAIRED[:2] + [{"prompt": PAIRS[0][0], "completions": ["two"], "labels": [True]}]
    ours = [
        scored(tiny_models, row["prompt"], row["completions"], [int(c) for c in row["labels"]], "answer")
        for row in rows
    ]
    for micro in (1, 3):
        [row] = train("train_kto", *run_flags(rows, f"micro{micro}", **{"train.micro_batch_size": micro}))
        assert row["kl"] == 0.0
        assert row["loss"] == pytest.approx(reference.kto(ours, 0.0), rel=1e-4)


def test_a_mismatch_that_does_not_fit_is_passed_over(tiny_models, answers, run_flags):
    """The longest prompt has no room for the first problem's answers; the next one that fits is the second's."""
    ours = answers["answer"]
    lengths = [len(reference.ids(one.prompt)) + len(one.response) for one in ours]
    max_len = lengths[6]
    kept = [one for one, length in zip(ours, lengths) if length <= max_len]
    assert kept == ours[:7]
    z0 = reference_point(mismatch_ratios(tiny_models, kept, max_len))
    assert z0 != pytest.approx(reference_point(mismatch_ratios(tiny_models, kept)), rel=1e-3)
    changes = {"data.max_len": max_len, "train.micro_batch_size": 3}
    [row] = train("train_kto", *run_flags(UNPAIRED, "run", **changes))
    assert row["kl"] == pytest.approx(z0, rel=1e-4)
    assert row["loss"] == pytest.approx(reference.kto(kept, z0), rel=1e-4)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_an_answer_without_room_for_any_mismatch_does_not_count_in_z0(tiny_models, run_flags, micro):
    rows = [
        {"prompt": "What is your name?", "completion": "F", "label": True},
        {"prompt": "1+1?\n", "completion": "so 2", "label": True},
        {"prompt": "2+2=\n", "completion": "hm", "label": False},
        {"prompt": "Q ", "completion": "I am Bo", "label": True},
    ]
    ours = [scored(tiny_models, row["prompt"], [row["completion"]], [int(row["label"])], "answer") for row in rows]
    max_len = len(rows[0]["prompt"]) + 2
    ratios = mismatch_ratios(tiny_models, ours, max_len)
    assert [ratio is None for ratio in ratios] == [True, False, False, False]
    z0 = reference_point(ratios)
    assert z0 > 0.1
    [row] = train("train_kto", *run_flags(rows, "run", **{"data.max_len": max_len, "train.micro_batch_size": micro}))
    assert row["kl"] == pytest.approx(z0, rel=1e-4)
    assert row["loss"] == pytest.approx(reference.kto(ours, z0), rel=1e-4)


def test_one_prior_pass_serves_every_objective_and_mismatches_need_one_more_once(run_flags, tmp_path, capsys):
    def misses(module, rows, output, **changes) -> tuple[int, int]:
        train(module, *run_flags(rows, output, **{"prior.cache_dir": tmp_path / "cache", **changes}))
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Prior cache: ")]
        _, _, hits, _, missing, *_ = line.split()
        return int(hits), int(missing)

    assert misses("train_pipa", UNPAIRED, "pipa_m") == (0, 8)
    assert misses("train_pipa", UNPAIRED, "pipa_n", **{"pipa.variant": "n", "data.annotation": "step"}) == (8, 0)
    assert misses("train_dpo", PAIRED, "dpo") == (8, 0)
    assert misses("train_dpo", PAIRED, "ipo", **{"model.ipo_enable": True}) == (8, 0)
    # Both answers of a problem are mismatched with the same one: four new prompt and answer pairs for eight records.
    assert misses("train_kto", UNPAIRED, "kto") == (12, 4)
    assert misses("train_kto", PAIRED, "step_kto", **{"data.annotation": "step"}) == (16, 0)
