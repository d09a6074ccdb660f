"""The ablations: further rows on the models and answers of the headline table, most at its learning rates."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from recipes.arithmetic_study.design import CONTROL, Row, Sizes, headline, labelling, prior, sampling, value_head
from recipes.arithmetic_study.stages import Stage, path

PIPA_M, PIPA_N = "unpaired_step_pipa_m", "unpaired_step_pipa_n"
COMPARED = (CONTROL, "unpaired_answer_kto", PIPA_M, PIPA_N)  # where the data change
MOST_ANSWERS = 16


def fixed_g() -> list[Row]:
    """Table 2."""
    return [_like(name, "fixed_g", "g = 0.5", {"pipa.fixed_value": 0.5}) for name in (PIPA_M, PIPA_N)]


def priors() -> list[Row]:
    """Table 3: the prior is trained on all answers (M) or on the wrong ones (N)."""
    return [
        _like(
            name,
            "prior",
            "(T)",
            {"prior.model_name_or_path": f"{{prior_{kept}_seedSEED}}"},
            needs=(f"prior_{kept}_seedSEED",),
        )
        for name, kept in ((PIPA_M, "all"), (PIPA_N, "negative"))
    ]


def sft_coef() -> list[Row]:
    """Table 4, and the other PIPA rows of its two settings: an SFT term of weight 1."""
    rows = [_like("unpaired_answer_kto", "sft", "+SFT", {"kto.sft_coef": 1.0})]
    names = ("paired_answer_pipa_m", "unpaired_answer_pipa_m", "unpaired_answer_pipa_n", PIPA_M, PIPA_N)
    return rows + [_like(name, "sft", "+SFT", {"pipa.sft_coef": 1.0}) for name in names]


def threshold() -> list[Row]:
    """Figure 5: steps are labelled by their value among the sampled answers."""
    return [
        _like(name, f"threshold{value}", f"threshold {value}", data=f"threshold{value}_seedSEED")
        for name in (PIPA_M, PIPA_N)
        for value in (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0)
    ]


def scaling() -> list[Row]:
    """An eighth to all of the problems, and 2 to 16 answers a problem."""
    return _on_data(("share0.125", "share0.25", "share0.5", "of2", "of4", "of16"))


def noise() -> list[Row]:
    """10 to 30 % of the answers with all labels turned round."""
    return _on_data(("wrong0.1", "wrong0.2", "wrong0.3"))


def imbalance() -> list[Row]:
    """One right answer for eight wrong ones, to eight right ones for one; and the extremes with weights that make both
    classes count the same, which is not in the paper."""
    weighted = [row for row in _on_data(("equal0.125", "equal8")) if row.changes != CONTROL]
    return _on_data(("ratio0.125", "ratio0.5", "ratio1", "ratio2", "ratio8")) + weighted


def checked() -> list[Row]:
    """Answers with a right result and a wrong step count as wrong from that step on; at learning rates of its own."""
    rows = _on_data(("checked",), (*COMPARED, "unpaired_step_step_kto"))
    return [replace(row, keeps_rate=False) for row in rows]


def beyond() -> list[Row]:
    """Not in the paper: losses that are means over tokens, value heads that learn faster or first, right tokens that
    are clipped."""
    names = [row.name for row in headline() if row.is_pipa]
    rows = [
        _like(name, mean, mean.replace("_", " "), {"pipa.loss_reduction": mean})
        for mean in ("sequence_mean", "token_mean")
        for name in names
    ]
    rows += [_like(name, "fast_g", "fast g", value_rate=100) for name in names]
    for name in names:
        head = f"head_{name}_seedSEED"
        rows.append(_like(name, "g_first", "g first", {"value.init_from": f"{{{head}}}"}, needs=(head,)))
    clipped = {"pipa.objective_module": "recipes/arithmetic_study/clipped_right.py"}
    of_m = [row.name for row in headline() if row.flags.get("pipa.variant") == "m"]
    return rows + [_like(name, "clipped_right", "right clipped", clipped) for name in of_m]


def sharper() -> list[Row]:
    """Not in the paper: the policy's ratio to the prior to a power below 1, at learning rates of its own."""
    names = [row.name for row in headline() if row.is_pipa]
    return [
        _like(name, f"beta{beta}", f"beta {beta}", {"pipa.beta": beta}, keeps_rate=False)
        for beta in (0.5, 0.3, 0.1)
        for name in names
    ]


PARTS: dict[str, Callable[[], list[Row]]] = {
    part.__name__: part
    for part in (fixed_g, priors, sft_coef, threshold, scaling, noise, imbalance, checked, beyond, sharper)
}


def _like(name: str, suffix: str, method: str, flags: dict[str, Any] | None = None, **more) -> Row:
    """A row of the headline table with something changed."""
    row = next(row for row in headline() if row.name == name)
    merged = {**row.flags, **(flags or {})}
    return replace(row, name=f"{name}_{suffix}", method=f"{row.method} {method}", flags=merged, changes=name, **more)


def _on_data(changes: tuple[str, ...], names: tuple[str, ...] = COMPARED) -> list[Row]:
    return [_like(name, one, one, data=f"{one}_seedSEED") for one in changes for name in names]


def preparation(part: str, rows: list[Row], rates: dict[str, float], sizes: Sizes) -> list[Stage]:
    """What a part's rows need beside the headline table's models and answers."""
    stages: list[Stage] = []
    for seed in range(sizes.seeds):
        if part == "priors":
            rate = rates[CONTROL]
            stages += [prior(kept, seed, rate, sizes) for kept in ("all", "negative")]
        if part == "beyond":
            stages += [value_head(row, seed, sizes) for row in headline() if row.is_pipa]
        if part == "scaling":
            stages += sampling(str(MOST_ANSWERS), seed, MOST_ANSWERS, sizes)
        changed = {row.data.removesuffix("_seedSEED") for row in rows} - {"answers"}
        stages += [_changed(one, seed, sizes) for one in sorted(changed)]
    return stages


# The flag that gets a name's number, and switches.
_CHANGES: dict[str, tuple[str, ...]] = {
    "share": ("share",),
    "of": ("answers_per_problem",),
    "wrong": ("wrong_labels",),
    "ratio": ("right_per_wrong",),
    "equal": ("right_per_wrong", "equal_classes"),
    "threshold": ("threshold",),
}


def _changed(name: str, seed: int, sizes: Sizes) -> Stage:
    """The answers of a seed, changed as ``name`` says, or labelled otherwise."""
    if name == "checked":
        return labelling(f"{name}_seed{seed}", f"sampled_seed{seed}", seed, sizes, check_right=True)
    kind = name.rstrip("-0123456789.")
    source = f"answers{MOST_ANSWERS if kind == 'of' else ''}_seed{seed}"
    number, *switches = _CHANGES[kind]
    flags = {"answers": path(f"{{{source}}}"), "seed": seed, number: name.removeprefix(kind)}
    flags |= dict.fromkeys(switches, True)
    return Stage(f"{name}_seed{seed}", "recipes.arithmetic_study.change_answers", "output", flags, (source,), ".jsonl")
