"""Answers as one text with a tag at the end of each step, as Math-Shepherd has them."""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.labelled import decide_prefixes, is_complete, labelled_record, split_question
from pipa_openrlhf.data.layouts.prm800k import rating
from pipa_openrlhf.data.layouts.prompts import complete_prompt
from pipa_openrlhf.data.record import Record

COLUMNS = ("input", "label")
READING = (
    "one answer, its steps ended by a tag (`--data.placeholder_token`); labels are the same text with + or - for the "
    'tags, or a list; the question is a column of its own or what stands before "Step 1"; the answer has the label '
    "of its last step; of `raw_labels`, PRM800K's ratings, 0 is by `--data.neutral_step`"
)
EXAMPLE = {"input": "1+1+1= Step 1: 1+1=2 ки\nStep 2: 2+1=4 ки", "label": "1+1+1= Step 1: 1+1=2 +\nStep 2: 2+1=4 -"}
# Math-Shepherd's, Qwen's and MATH-APS's.
TAGS = ("ки", "<extra_0>", "\n\n\n\n\n")
TEXTS = ("input", "process", "answer")
RATINGS = "raw_labels"  # PRM800K's; the `labels` beside them call neutral steps wrong
LABELS = (RATINGS, "label", "labels", "value", "values")
QUESTIONS = ("question", "prompt", "problem")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether there are a text with tags, and labels as a list or as a text that begins the same."""
    text, name = row.get(_text_name(row, flags)), _label_name(row, flags)
    if not isinstance(text, str) or name is None:
        return False
    tag = _tag(text, flags)
    if tag is None:
        return False
    labels, before = row[name], text.split(tag)[0]
    return isinstance(labels, list) or (isinstance(labels, str) and len(labels) > 1 and labels.startswith(before))


def choose(rows: list[dict], flags: DataConfig, dataset: str) -> DataConfig:
    """Decide ``--data.prefixes``: in conversions of PRM800K some answers do not end."""
    texts = ((text, _tag(text, flags)) for row in rows if isinstance(text := row.get(_text_name(row, flags)), str))
    pieces = ([piece for piece in text.split(tag) if piece.strip()] for text, tag in texts if tag)
    return decide_prefixes((steps[-1] for steps in pieces if steps), flags)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{input, label}``, ``{input, value: [...]}`` and ``{question, process, labels: [...]}``."""
    name, label_name = _text_name(row, flags), _label_name(row, flags) or LABELS[0]
    text = fields.text(fields.column(row, name, where), name, where)
    tag = _tag(text, flags)
    if tag is None:
        problem = f"{name!r} has no tag at the end of its steps ({flags.placeholder_token or ', '.join(TAGS[:2])})"
        fields.refuse(where, problem, "name it by --data.placeholder_token")
    *steps, rest = text.split(tag)
    labels = _labels(fields.column(row, label_name, where), label_name, [*steps, rest], where, flags)
    if rest.strip():  # the answer goes on, unlabelled
        steps, labels = [*steps, rest], [*labels, None]
    prompt = None
    if _question_name(row, flags) is None:
        question, steps[0] = split_question(steps[0], name, where)
        prompt = complete_prompt(row, name, question, flags, where)
    else:
        # Some data write the question before the steps too.
        question = row[_question_name(row, flags)]
        if isinstance(question, str) and question.strip() and steps[0].lstrip().startswith(question.strip()):
            steps[0] = steps[0].lstrip()[len(question.strip()) :]
    if prompt is None and row.get(name) is not None and name == "input":
        row = {key: value for key, value in row.items() if key != name}  # it is no part of the prompt
    complete = is_complete(steps[-1], flags)
    last = labels[-1] if complete else None
    return [
        labelled_record(
            row, where, flags, steps, labels, name=name, answer_label=last, complete=complete, prompt=prompt
        )
    ]


def _text_name(row: dict, flags: DataConfig) -> str:
    return flags.input_key or next((name for name in TEXTS if row.get(name) is not None), TEXTS[0])


def _label_name(row: dict, flags: DataConfig) -> str | None:
    names = (flags.label_key,) if flags.label_key else LABELS
    return next((name for name in names if row.get(name) is not None), None)


def _question_name(row: dict, flags: DataConfig) -> str | None:
    return flags.prompt_key or next((name for name in QUESTIONS if row.get(name) is not None), None)


def _tag(text: str, flags: DataConfig) -> str | None:
    names = (flags.placeholder_token,) if flags.placeholder_token else TAGS
    return next((tag for tag in names if tag in text), None)


def _labels(value: object, name: str, pieces: list[str], where: str, flags: DataConfig) -> list[int | None]:
    """One label a tag; in a text, the signs stand where the tags do."""
    if not isinstance(value, str):
        if name == RATINGS and isinstance(value, list) and len(value) == len(pieces) - 1:
            return [rating(one, f"{name}[{number}]", where, flags) for number, one in enumerate(value)]
        return fields.labels(value, name, len(pieces) - 1, where, flags.step_threshold, flags.neutral_step)
    signs, end = "", 0
    for piece in pieces[:-1]:
        end += len(piece) + 1
        signs += value[end - 1 : end]
    same = "".join(piece + sign for piece, sign in zip(pieces, [*signs, ""]))
    if len(signs) < len(pieces) - 1 or signs.strip("+-") or same.rstrip() != value.rstrip():
        problem = f"{name!r} is not the same text with + or - in place of the tags"
        fields.refuse(where, problem, "correct it, give a list of labels, or remove the row")
    return [int(sign == "+") for sign in signs]
