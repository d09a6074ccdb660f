"""CHAMP: solutions in which the first wrong step is marked, a file of all problems or a row for each."""

from collections.abc import Iterator

from pipa_openrlhf.data import fields
from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record
from pipa_openrlhf.data.layouts.labelled import until_error
from pipa_openrlhf.data.record import FROM_STEPS, Record

COLUMNS = ("problems",)
READING = (
    "a record for each annotated solution of each problem, in up to three steps: what stands before the first wrong "
    "step, that step, and what follows by `--data.after_first_error`; one without a mistake is right; of others it is "
    "not known whether the answer is"
)
EXAMPLE = {
    "problems": {
        "P_1": {
            "_text": "1+1+1=",
            "fws_annotations": {
                "small": {"text": "1+1=2\n2+1=4\nIt is 4.", "start_idx": 6, "end_idx": 11},
                "large": {"text": "1+1=2\n2+1=3", "start_idx": None, "end_idx": None},
            },
        }
    }
}
ANNOTATIONS, TEXT = "fws_annotations", "_text"


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether there are annotations of first wrong steps."""
    problems = _problems(row)
    return bool(problems) and all(ANNOTATIONS in problem and TEXT in problem for problem in problems.values())


def _problems(row: dict) -> dict[str, dict]:
    """Each problem with the place that it has in the row."""
    problems = row.get("problems")
    return {f"problems.{name}.": one for name, one in problems.items()} if isinstance(problems, dict) else {"": row}


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """Problems whose solutions are not annotated yield nothing."""
    return [record for place, one in _problems(row).items() for record in _solutions(one, place, where, flags)]


def _solutions(problem: dict, place: str, where: str, flags: DataConfig) -> Iterator[Record]:
    question = fields.text(problem.get(TEXT), f"{place}{TEXT}", where)
    for name, solution in (problem.get(ANNOTATIONS) or {}).items():
        at = f"{place}{ANNOTATIONS}.{name}"
        steps, first = _steps(solution, at, where, flags)
        conversation = join(question, Answer(at, steps), flags, where)
        labels = until_error(len(steps), first, at, where, flags)
        right = 1 if first is None else None
        yield make_record(
            problem, where, conversation, step_labels=labels, answer_label=right, label_source=FROM_STEPS
        )


def _steps(solution: dict, at: str, where: str, flags: DataConfig) -> tuple[list[str], int | None]:
    """The steps, and which is the wrong one."""
    text = fields.text(solution.get("text"), f"{at}.text", where)
    marks = solution.get("start_idx"), solution.get("end_idx")
    if marks == (None, None):
        return [text], None
    start, end = map(fields.whole_number, marks)
    if start is None or end is None or not 0 <= start < end <= len(text) or not text[start:end].strip():
        problem = f"'{at}' marks no step by {' to '.join(map(fields.show, marks))}"
        fields.refuse(where, problem, "give the characters where it starts and ends, or null for no mistake")
    before, after = text[:start], text[end:]
    before = before.removesuffix(flags.step_separator) if before.endswith(flags.step_separator) else before.rstrip()
    after = after.removeprefix(flags.step_separator) if after.startswith(flags.step_separator) else after.lstrip()
    steps = [*([before] if before.strip() else []), text[start:end], *([after] if after.strip() else [])]
    return steps, int(bool(before.strip()))
