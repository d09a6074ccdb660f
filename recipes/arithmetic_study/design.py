"""What the study trains: the rows of the paper's Table 1 and of its ablations, as stages of commands.

Every row starts from the model after SFT, which is also its prior and the model that sampled the answers.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from recipes.arithmetic_study.stages import CLI, Stage, path

PROMPT = {"data.input_template": "{}\n", "ds.param_dtype": "fp32"}
LONGEST_ANSWER = 64  # tokens; the longest right one has about fifty


@dataclass(frozen=True)
class Sizes:
    """How large the study is. A run's time is about proportional to answers and epochs, the study's to runs."""

    base: int = 40000
    base_rate: float = 2e-3
    sft: int = 400
    sft_rate: float = 2e-4
    sample: int = 300
    answers: int = 8
    validation: int = 500
    test: int = 1000
    seeds: int = 3
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    epochs: int = 1
    batch_size: int = 64
    hidden_size: int = 128
    layers: int = 4
    teacher_answers: int = 0  # in place of the model's own, where it is too small to have any right


SMOKE = Sizes(
    base=256,
    sft=32,
    sample=8,
    answers=2,
    validation=8,
    test=16,
    seeds=2,
    rates=(1e-4, 3e-4),
    hidden_size=32,
    layers=1,
    teacher_answers=8,
    batch_size=16,
)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: of its runs, as a part of file names.
        setting: pairing and labels, as the paper's Table 1 groups them.
        method: as the table calls it.
        module: the training command.
        flags: what differs from the other rows.
        rate_of: the row whose learning rate is taken; None: the best of the grid is chosen for this one.
        data: the stage that makes its answers, with ``SEED`` for the seed.
        needs: further stages that ``flags`` name.
    """

    name: str
    setting: str
    method: str
    module: str
    flags: dict[str, Any] = field(default_factory=dict)
    rate_of: str | None = None
    data: str = "answers_seedSEED"
    needs: tuple[str, ...] = ()

    @property
    def is_pipa(self) -> bool:
        """Whether it is a row of the method under study."""
        return self.module == "train_pipa"


SETTINGS = ("paired, answer", "paired, step", "unpaired, answer", "unpaired, step")
CONTROL = "own_right"


def headline() -> list[Row]:
    """The 15 rows of Table 1, and SFT on the right ones of the same answers, which the paper's table does not have."""
    answer, step = {"DPO": {}, "IPO": {"model.ipo_enable": True}}, {"Step-DPO": {}}
    rows = []
    for setting in SETTINGS:
        is_paired, is_step = setting.startswith("paired"), setting.endswith("step")
        common: dict[str, Any] = {"data.pairing": "match"} if is_paired else {}
        common |= {"data.annotation": "step"} if is_step else {}
        methods: list[tuple[str, str, dict]] = []
        if is_paired:
            methods += [(name, "train_dpo", flags) for name, flags in (step if is_step else answer).items()]
        methods += [("Step-KTO" if is_step else "KTO", "train_kto", {})]
        methods += [(f"PIPA-{variant.upper()}", "train_pipa", {"pipa.variant": variant}) for variant in "mn"]
        for method, module, flags in methods:
            name = f"{setting.replace(', ', '_')}_{method.lower().replace('-', '_')}"
            rows.append(Row(name, setting, method, module, {**common, **flags}))
    return [Row(CONTROL, "right answers", "SFT", "train_sft"), *rows]


def preparation(sizes: Sizes) -> list[Stage]:
    """Problems, the base model, SFT on right answers, and for each seed the model's own answers with their labels."""
    problems = Stage(
        "problems",
        "recipes.arithmetic_study.make_problems",
        "output_dir",
        {
            name: getattr(sizes, name)
            for name in ("base", "sft", "sample", "validation", "test", "hidden_size", "layers", "teacher_answers")
        },
    )
    # Minutes: it goes on from its last checkpoint.
    saved = {"ckpt.save_steps": 100, "ckpt.max_num": 1, "ckpt.load_enable": True}
    base = _train("base", "train_sft", "{problems}/random", "{problems}/base.jsonl", sizes, sizes.base_rate, saved)
    sft = _train("sft", "train_sft", "{base}", "{problems}/sft.jsonl", sizes, sizes.sft_rate, {})
    stages = [problems, replace(base, needs=("problems",), goes_on=True), replace(sft, needs=("problems", "base"))]
    for name in ("base", "sft"):
        stages.append(evaluation(name, "test"))
    for seed in range(sizes.seeds):
        stages += sampling("", seed, sizes.answers, sizes)
    return stages


def sampling(suffix: str, seed: int, answers: int, sizes: Sizes) -> list[Stage]:
    """``answers`` of the model after SFT to each problem of a seed, and their labels."""
    questions = path(f"{{problems}}/sample{seed}.jsonl")
    sampled = Stage(
        f"sampled{suffix}_seed{seed}",
        f"{CLI}sample",
        "sample.output",
        {
            "model.model_name_or_path": path("{sft}"),
            "problems.file": questions,
            "sample.num_answers": answers,
            "sample.temperature": 1,
            "sample.max_new_tokens": LONGEST_ANSWER,
            "sample.batch_size": 512,
            "train.seed": seed,
            **PROMPT,
        },
        ("problems", "sft"),
        ".jsonl",
    )
    labelled = Stage(
        f"answers{suffix}_seed{seed}",
        "recipes.word_problems.label_steps",
        "output",
        {
            "answers": path(f"{{problems}}/teacher{seed}.jsonl" if sizes.teacher_answers else f"{{{sampled.name}}}"),
            "problems": questions,
        },
        ("problems", sampled.name),
        ".jsonl",
    )
    return [sampled, labelled]


def run_name(row: Row, rate: float, seed: int) -> str:
    """Of a stage that trains."""
    return f"{row.name}_lr{rate:g}_seed{seed}"


def training(row: Row, rate: float, seed: int, sizes: Sizes) -> Stage:
    """One run of a row."""
    data = row.data.replace("SEED", str(seed))
    flags: dict[str, Any] = {"train.seed": seed, **_of_seed(row.flags, seed)}
    if row.is_pipa and "pipa.fixed_value" not in flags:
        flags["value.lr"] = 10 * rate
    if row.module == "train_dpo":
        flags["train.batch_size"] = sizes.batch_size // 2  # of pairs
    if row.module == "train_sft":
        # About half of the answers are right: as many steps as the others take.
        flags["train.max_epochs"] = 2 * sizes.epochs
    stage = _train(run_name(row, rate, seed), row.module, "{sft}", f"{{{data}}}", sizes, rate, flags)
    return replace(stage, needs=("sft", data, *(name.replace("SEED", str(seed)) for name in row.needs)))


def prior(kept: str, seed: int, rate: float, sizes: Sizes) -> Stage:
    """The prior of the (T) rows: SFT on all or on the negative answers, three epochs."""
    flags = {"data.keep": kept, "train.max_epochs": 3, "train.seed": seed}
    data = f"answers_seed{seed}"
    stage = _train(f"prior_{kept}_seed{seed}", "train_sft", "{sft}", f"{{{data}}}", sizes, rate, flags)
    return replace(stage, needs=("sft", data))


def _of_seed(flags: dict[str, Any], seed: int) -> dict[str, Any]:
    return {
        name: path(value.replace("SEED", str(seed))) if isinstance(value, str) and "{" in value else value
        for name, value in flags.items()
    }


def _train(name: str, module: str, start: str, data: str, sizes: Sizes, rate: float, more: dict[str, Any]) -> Stage:
    flags = {
        "model.model_name_or_path": path(start),
        "data.dataset": path(data),
        "train.batch_size": sizes.batch_size,
        "train.micro_batch_size": sizes.batch_size,
        "train.max_epochs": sizes.epochs,
        "adam.lr": rate,
        "ds.zero_stage": 0,
        **PROMPT,
        **more,
    }
    return Stage(name, f"{CLI}{module}", "ckpt.output_dir", flags)


def evaluation(run: str, split: str) -> Stage:
    """Greedy answers of a trained model to a split's problems."""
    flags = {
        "model.model_name_or_path": path(f"{{{run}}}"),
        "problems.file": path(f"{{problems}}/{split}.jsonl"),
        "evaluate.max_new_tokens": LONGEST_ANSWER,
        "evaluate.batch_size": 512,
        **PROMPT,
    }
    return Stage(f"{run}_{split}", f"{CLI}evaluate", "evaluate.output_dir", flags, ("problems", run))
