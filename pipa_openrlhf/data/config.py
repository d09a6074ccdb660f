"""Settings of the data: what is read, how it is labelled and cut."""

from dataclasses import dataclass
from functools import partial

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.remembered import user_cache_dir
from pipa_openrlhf.settings import by_content, free, unescaped


@dataclass(frozen=True)
class TemplateConfig:
    """How a prompt becomes text, and text tokens; the same in training and generation."""

    disable_fast_tokenizer: bool = by_content(False, "use the slow tokenizer")
    input_template: str | None = by_content(None, "format string around a text prompt, with one {}")
    apply_chat_template: bool = by_content(False, "use the tokenizer's chat template")
    tokenizer_chat_template: str | None = by_content(None, "chat template instead: a file or its text", is_path=True)

    special_tokens: str = by_content(
        "text",
        "what text of the data is that spells a special token: text; prompt: that token in prompts without a chat "
        "template, text elsewhere; refuse: the row is bad",
        choices=("text", "prompt", "refuse"),
    )

    def check(self) -> None:
        """Raises UserError."""
        if self.tokenizer_chat_template and not self.apply_chat_template:
            raise UserError("--data.tokenizer_chat_template needs --data.apply_chat_template")


@dataclass(frozen=True)
class DataConfig(TemplateConfig):
    """What is read, and how it is labelled and cut."""

    dataset: str | None = by_content(None, "file, folder or hub name; several with commas", is_path=True)
    dataset_probs: str | None = by_content(None, "sampling probabilities of several data sets")
    dataset_split: str = by_content("train", "split")
    max_samples: int = by_content(1000000, "most rows read of a data set", least=1)
    prompt_key: str | None = by_content(None, "prompt column; unset: `prompt` or another usual name")
    chosen_key: str = by_content("chosen", "column of the better answer")
    rejected_key: str = by_content("rejected", "column of the worse answer")
    input_key: str | None = by_content(None, "single answers: prompt column, or whole conversation without output_key")
    output_key: str | None = by_content(None, "single answers: answer column")
    label_key: str | None = by_content(
        None, "label of the whole answer; unset: `label` beside single answers, `answer_label` beside steps"
    )
    max_len: int = by_content(512, "longest prompt + answer in tokens; longer ones are dropped", least=2)
    format: str = by_content("auto", "layout of the rows, see docs/data.md; auto: decided by columns and values")
    layout_module: str | None = by_content(None, "Python file with a layout of your own", is_path=True)
    allow_empty_prompt: bool = free(False, "take data whose prompts are empty")
    prefixes: str = by_content(
        "auto",
        "true: a row of steps is the beginning of an answer, unless it ends in a final answer; auto: where rows "
        "continue each other",
        choices=("auto", "true", "false"),
    )
    neutral_step: str = by_content(
        "mask", "what a step rated neutral is; mask: outside every loss", choices=("mask", "positive", "negative")
    )
    after_first_error: str = by_content(
        "negative", "what the steps after the first wrong one are", choices=("negative", "mask")
    )
    placeholder_token: str | None = by_content(
        None, "text that marks the end of a step; unset: the usual ones are looked for"
    )
    whole_answers: bool = by_content(
        False, "Step-DPO: take full_chosen and full_rejected, not the one step that differs"
    )
    annotation: str = by_content("answer", "label of a token: its answer's or its step's", choices=("answer", "step"))
    pairing: str = by_content(
        "auto",
        "auto: pairs where the objective compares them, else single answers; given: pairs of the data only; "
        "match: match right and wrong answers of a problem too, drop the rest",
        choices=("auto", "given", "match"),
    )
    step_threshold: float = by_content(
        0.5, "a value (Q, a share, a score) at or above it makes a step right", least=-1, most=1
    )
    step_separator: str = by_content("\n", "text between steps; \\n and \\t are understood", parse=unescaped)
    mask_tool_output: bool = by_content(
        True, "true|false: keep interpreter <output> text out of every loss (AlphaMath)"
    )
    on_error: str = free(
        "fail", "what a row that cannot be read does: end the run, or be left out and listed", choices=("fail", "skip")
    )
    max_error_share: float = free(0.01, "most rows left out by --data.on_error skip, as a share", least=0, most=1)
    streaming: bool = free(False, "take rows as they come, from the hub or files, and keep only prepared tokens")
    cache_dir: str = free(partial(user_cache_dir, "data"), "prepared data, shared by runs", is_written=True)
    num_proc: int = free(0, "processes that prepare large data; 0: one a core", least=0)
    dataloader_num_workers: int = free(0, "worker processes that collate batches", least=0)

    def check(self) -> None:
        """Raises UserError."""
        super().check()
        names = dataset_names(self.dataset)
        if self.dataset_probs is not None:
            parse_probabilities(self.dataset_probs, len(names))
        if self.output_key and not self.input_key:
            raise UserError("--data.output_key needs --data.input_key, the column of the prompt")


def dataset_names(dataset: str | None) -> list[str]:
    """Files, folders and hub names of ``--data.dataset``.

    Raises:
        UserError: one is missing.
    """
    names = [name.strip() for name in (dataset or "").split(",")]
    if not all(names):
        raise UserError("--data.dataset is missing or has an empty name: give a file, a folder or a hub name")
    return names


def parse_probabilities(text: str, num_datasets: int) -> list[float]:
    """``--data.dataset_probs`` as numbers, one a data set.

    Raises:
        UserError: they are no probabilities of that many data sets.
    """
    flag = f"--data.dataset_probs {text}"
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError:
        raise UserError(f"{flag}: give numbers with commas between them, such as 0.7,0.3") from None
    if len(weights) != num_datasets:
        raise UserError(f"{flag}: {len(weights)} probabilities for {num_datasets} data sets; give one for each")
    # A data set of probability 0 would never be exhausted, and the interleaving never end.
    if not all(weight > 0 for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise UserError(f"{flag}: probabilities must be above 0 and add up to 1")
    return weights
