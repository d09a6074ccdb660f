"""From the data flags to samples: the one call that trainers and tools make."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.chat_template import use_chat_template
from pipa_openrlhf.data.kto_columns import rename_kto_columns
from pipa_openrlhf.data.labels import check_step_labels, keep_labels, match_pairs
from pipa_openrlhf.data.readers import read_records
from pipa_openrlhf.data.sources import read_rows
from pipa_openrlhf.data.tokenise import Sample, tokenise
from pipa_openrlhf.errors import UserError

Say = Callable[[str], None]


@dataclass(frozen=True)
class LoadedData:
    """Samples in data order; the two sides of a pair are neighbours, chosen first.

    Attributes:
        dropped: how many records were left out, by reason.
        format: the format the data was read as.
        num_records: answers read, before anything was left out.
    """

    samples: list[Sample]
    dropped: dict[str, int]
    format: str
    num_records: int


def load_samples(
    args: SimpleNamespace,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset: str | None,
    probs: str | None = None,
    split: str = "train",
    max_samples: int | None = None,
    pairs_only: bool = False,
    say: Say = print,
) -> LoadedData:
    """Read, check, tokenise, pair and filter a data set as the flags say.

    Args:
        args: nested flags; ``data``, ``train.seed`` and ``use_ms`` are used.
        max_samples: unset: ``--data.max_samples``.
        pairs_only: the objective compares pairs.
        say: prints one line; silent on all ranks but the first.

    Raises:
        UserError: the data or a data flag cannot be used, or nothing is left of the data.
    """
    flags = _checked_flags(args.data, tokenizer, say)
    limit = flags.max_samples if max_samples is None else max_samples
    rows = read_rows(dataset, probs, split, limit, args.train.seed, args.use_ms, say)
    if getattr(flags, "input_key", None):
        rows = rename_kto_columns(rows, flags.input_key, flags.output_key, flags.label_key)
    name, records = read_records(rows, flags)
    why = "by its columns" if flags.format == "auto" else "by --data.format"
    say(f"{dataset}: format {name} ({why}: {', '.join(map(str, rows[0][1]))}), {len(records)} answers")
    pairing = "given" if pairs_only and flags.pairing == "unpaired" else flags.pairing
    if pairing == "given" and any(record.pair_id is None for record in records):
        raise UserError(
            f"{dataset} holds single answers and pairs are wanted: give --data.pairing paired to match "
            "each right answer with a wrong one of the same problem"
        )
    if flags.annotation == "step":
        check_step_labels(records)

    samples, dropped = tokenise(
        records,
        tokenizer,
        max_len=flags.max_len,
        annotation=flags.annotation,
        step_separator=flags.step_separator,
    )
    say(f"{dataset}: {len(samples)} answers kept" + (f", dropped {dropped}" if dropped.counts else ", none dropped"))
    if not samples:
        raise UserError(f"{dataset}: nothing left to train on, dropped {dropped}")
    counts = dict(dropped.counts)
    if pairing != "unpaired":
        samples = _pair(samples, args.train.seed, pairing, dataset, counts, say)
    samples = _keep(samples, getattr(flags, "keep", "all"), dataset, counts, say)
    return LoadedData(samples, counts, name, len(records))


def _checked_flags(flags: SimpleNamespace, tokenizer: PreTrainedTokenizerBase, say: Say) -> SimpleNamespace:
    """The data flags, with the input template dropped where OpenRLHF drops it."""
    template = flags.input_template
    if flags.apply_chat_template:
        use_chat_template(tokenizer, flags.tokenizer_chat_template)
    if template is not None and flags.apply_chat_template:
        say("--data.input_template is not used with --data.apply_chat_template")
        template = None
    if template is not None and "{}" not in template:
        say("--data.input_template has no {}: it is not used")
        template = None
    if template is not None and "\\n" in template:
        say("--data.input_template holds a backslash and an n, not a newline; in bash a newline is $'\\n'")
    if template is not None:
        _try_template(template)
    return SimpleNamespace(**{**vars(flags), "input_template": template})


def _try_template(template: str) -> None:
    try:
        template.format("")
    except (IndexError, KeyError, ValueError) as error:
        raise UserError(
            f"--data.input_template: {type(error).__name__} {error}; use one {{}} and double every other brace"
        ) from None


def _pair(
    samples: list[Sample], seed: int, pairing: str, dataset: str, dropped: dict[str, int], say: Say
) -> list[Sample]:
    paired = match_pairs(samples, seed)
    unmatched = len(samples) - len(paired)
    given = sum(sample.pair_id is not None for sample in samples) // 2
    right = sum(sample.answer_label for sample in samples) - len(paired) // 2
    say(
        f"{dataset}: {len(paired) // 2} pairs{' (as given)' if given else ''}, "
        f"dropped without a partner: {right} right and {unmatched - right} wrong answers"
    )
    if unmatched:
        dropped[f"without a partner (--data.pairing {pairing})"] = unmatched
    if not paired:
        raise UserError(f"{dataset}: --data.pairing {pairing} found no problem with a right and a wrong answer")
    return paired


def _keep(samples: list[Sample], keep: str, dataset: str, dropped: dict[str, int], say: Say) -> list[Sample]:
    if keep == "all":
        return samples
    kept = keep_labels(samples, keep)
    say(f"{dataset}: {len(kept)} {keep} answers kept of {len(samples)} (--data.keep {keep})")
    if len(kept) < len(samples):
        dropped[f"not {keep} (--data.keep)"] = len(samples) - len(kept)
    if not kept:
        raise UserError(f"{dataset}: --data.keep {keep}, but no answer is {keep}")
    return kept
