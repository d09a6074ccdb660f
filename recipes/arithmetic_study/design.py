"""What the study trains: the rows of the paper's Table 1 and of its ablations, as stages of commands.

Every row starts from the model after SFT, which is also its prior and the model that sampled the answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.settings import setting
from recipes.arithmetic_study.stages import CLI, Stage, path

PROMPT = {"data.input_template": "{}\n", "ds.param_dtype": "fp32"}
HEAD_RATE = 3e-3  # of a value head that learns alone
LONGEST_ANSWER = 64  # tokens; the longest right one has about fifty


@dataclass(frozen=True)
class Sizes:
    """How large the study is. A run's time is about proportional to answers and epochs, the study's to runs."""

    base: int = setting(24000, "answers of the teacher that the base model learns from", least=1)
    base_epochs: int = setting(2, "passes over these", least=1)
    base_rate: float = setting(2e-3, "learning rate of that", above=0)
    sft: int = setting(200, "right answers for SFT", least=1)
    sft_rate: float = setting(5e-5, "learning rate of that", above=0)
    pool: int = setting(800, "problems that are written to be sampled, of each seed", least=1)
    sample: int = setting(800, "problems of these that are", least=1)
    answers: int = setting(8, "answers to each", least=1)
    validation: int = setting(300, "problems to choose a learning rate on", least=1)
    test: int = setting(1000, "held-out problems", least=1)
    seeds: int = setting(5, "seeds of each row", least=1, most=8)
    rates: Sequence[float] = setting((3e-5, 1e-4, 3e-4, 1e-3), "learning rates to choose from", nargs="+", above=0)
    more_rates: int = setting(2, "most that are added for a row while its best is the highest or the lowest", least=0)
    epochs: int = setting(1, "passes over the answers; SFT makes twice as many over the right ones", least=1)
    batch_size: int = setting(32, "answers of a batch", least=2)
    hidden_size: int = setting(128, "width of the model", least=8)
    layers: int = setting(4, "of the model", least=1)
    teacher_answers: int = setting(0, "answers of the teacher to each problem, in place of the model's own", least=0)

    def check(self) -> None:
        """Raises UserError."""
        if len(set(self.rates)) < 2 and self.more_rates:
            raise UserError(
                "--sizes.more_rates goes on where two --sizes.rates lead: give two, or --sizes.more_rates 0"
            )
        if self.sample > self.pool:
            raise UserError(f"--sizes.sample {self.sample} is more than --sizes.pool {self.pool}")


# A model that small has nothing right: its teacher answers for it.
SMOKE = Sizes(
    base=256,
    base_epochs=1,
    sft=32,
    pool=8,
    sample=8,
    answers=2,
    validation=8,
    test=16,
    seeds=2,
    rates=(1e-3, 3e-3),
    more_rates=0,
    hidden_size=32,
    layers=1,
    teacher_answers=8,
    batch_size=4,
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
        changes: the row of the headline table that it is compared with; None: it is one of these itself.
        keeps_rate: the learning rate is that of the row that it changes; otherwise the best is chosen for it too.
        data: the stage that makes its answers, with ``SEED`` for the seed.
        needs: further stages that ``flags`` name.
        value_rate: learning rate of the value head, in the policy's.
    """

    name: str
    setting: str
    method: str
    module: str
    flags: dict[str, Any] = field(default_factory=dict)
    changes: str | None = None
    keeps_rate: bool = True
    data: str = "answers_seedSEED"
    needs: tuple[str, ...] = ()
    value_rate: float = 10

    @property
    def is_pipa(self) -> bool:
        """Whether it is a row of the method under study."""
        return self.module == "train_pipa"

    @property
    def rate_of(self) -> str:
        """The row for which its learning rate was chosen."""
        return self.changes if self.changes and self.keeps_rate else self.name


SETTINGS = ("paired, answer", "paired, step", "unpaired, answer", "unpaired, step")
CONTROL = "own_right"


def headline() -> list[Row]:
    """The 15 rows of Table 1, and SFT on the right ones of the same answers, which the paper's table does not have."""
    answer, step = {"DPO": {}, "IPO": {"model.ipo_enable": True}}, {"Step-DPO": {}}
    rows = []
    for group in SETTINGS:
        is_paired, is_step = group.startswith("paired"), group.endswith("step")
        common: dict[str, Any] = {"data.pairing": "match"} if is_paired else {}
        common |= {"data.annotation": "step"} if is_step else {}
        methods: list[tuple[str, str, dict]] = []
        if is_paired:
            methods += [(name, "train_dpo", flags) for name, flags in (step if is_step else answer).items()]
        methods += [("Step-KTO" if is_step else "KTO", "train_kto", {})]
        methods += [(f"PIPA-{variant.upper()}", "train_pipa", {"pipa.variant": variant}) for variant in "mn"]
        for method, module, flags in methods:
            name = f"{group.replace(', ', '_')}_{method.lower().replace('-', '_')}"
            rows.append(Row(name, group, method, module, {**common, **flags}))
    return [Row(CONTROL, "right answers", "SFT", "train_sft"), *rows]


def preparation(sizes: Sizes) -> list[Stage]:
    """Problems, the base model, SFT on right answers, and for each seed the model's own answers with their labels."""
    problems = Stage(
        "problems",
        "recipes.arithmetic_study.make_problems",
        "output_dir",
        {
            "base": sizes.base,
            "sft": sizes.sft,
            "sample": sizes.pool,
            "validation": sizes.validation,
            "test": sizes.test,
            "hidden_size": sizes.hidden_size,
            "layers": sizes.layers,
            "teacher_answers": sizes.teacher_answers,
        },
    )
    # Minutes: it goes on from its last checkpoint.
    saved = {
        "train.max_epochs": sizes.base_epochs,
        "ckpt.save_steps": 100,
        "ckpt.max_num": 1,
        "ckpt.load_enable": True,
    }
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
            "problems.max": sizes.sample,
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
    return [sampled, labelling(f"answers{suffix}_seed{seed}", sampled.name, seed, sizes)]


def labelling(name: str, sampled: str, seed: int, sizes: Sizes, **flags: Any) -> Stage:
    """The steps of the answers of the stage ``sampled``, labelled."""
    answers = path(f"{{problems}}/teacher{seed}.jsonl" if sizes.teacher_answers else f"{{{sampled}}}")
    flags = {"answers": answers, "problems": path(f"{{problems}}/sample{seed}.jsonl"), **flags}
    return Stage(name, "recipes.word_problems.label_steps", "output", flags, ("problems", sampled), ".jsonl")


def run_name(row: Row, rate: float, seed: int) -> str:
    """Of a stage that trains."""
    return f"{row.name}_lr{rate:g}_seed{seed}"


def training(row: Row, rate: float, seed: int, sizes: Sizes) -> Stage:
    """One run of a row."""
    data = row.data.replace("SEED", str(seed))
    flags: dict[str, Any] = {"train.seed": seed, **_of_seed(row.flags, seed)}
    if row.is_pipa and "pipa.fixed_value" not in flags:
        flags["value.lr"] = row.value_rate * rate
    if row.module == "train_dpo":
        flags["train.batch_size"] = sizes.batch_size // 2  # of pairs
    if row.module == "train_sft":
        # About half of the answers are right: as many steps as the others take.
        flags["train.max_epochs"] = 2 * sizes.epochs
    needs = tuple(name.replace("SEED", str(seed)) for name in row.needs)
    return _from_sft(run_name(row, rate, seed), row.module, data, sizes, rate, flags, needs)


def prior(kept: str, seed: int, rate: float, sizes: Sizes) -> Stage:
    """The prior of the (T) rows: SFT on all or on the negative answers, three epochs."""
    flags = {"data.keep": kept, "train.max_epochs": 3, "train.seed": seed}
    return _from_sft(f"prior_{kept}_seed{seed}", "train_sft", f"answers_seed{seed}", sizes, rate, flags)


def value_head(row: Row, seed: int, sizes: Sizes) -> Stage:
    """A value head for a PIPA row, trained on its answers before the policy moves."""
    data = row.data.replace("SEED", str(seed))
    flags = {**row.flags, "train.max_epochs": 3, "train.seed": seed, "value.lr": HEAD_RATE}
    return _from_sft(f"head_{row.name}_seed{seed}", row.module, data, sizes, 0.0, flags)


def _from_sft(
    name: str, module: str, data: str, sizes: Sizes, rate: float, more: dict[str, Any], needs: tuple[str, ...] = ()
) -> Stage:
    """A training from the model after SFT on the answers of the stage ``data``."""
    stage = _train(name, module, "{sft}", f"{{{data}}}", sizes, rate, more)
    return replace(stage, needs=("sft", data, *needs))


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
    return Stage(name, f"{CLI}{module}", "ckpt.output_dir", flags, proof="README.md")


def evaluation(run: str, split: str) -> Stage:
    """Greedy answers of a trained model to a split's problems."""
    flags = {
        "model.model_name_or_path": path(f"{{{run}}}"),
        "problems.file": path(f"{{problems}}/{split}.jsonl"),
        "evaluate.max_new_tokens": LONGEST_ANSWER,
        "evaluate.batch_size": 512,
        **PROMPT,
    }
    return Stage(
        f"{run}_{split}", f"{CLI}evaluate", "evaluate.output_dir", flags, ("problems", run), proof="summary.json"
    )
