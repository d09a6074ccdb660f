"""Why rows that look like public data are not read: they have no labels."""

from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.answer_columns import LABELS, answer_columns
from pipa_openrlhf.data.layouts.prompts import CONVERSATIONS, NAMES

SAMPLE = "python -m pipa_openrlhf.cli.sample makes labelled answers"
ADD = "add 'label' (1 right, 0 wrong), or give 'chosen' and 'rejected'"
LISTS = ("responses", "answers", "solutions", "generations", "samples", "completions", "outputs")
REFERENCES = ("question", "problem")
# What stands beside the prompts of verl, OpenRLHF and sets of problems; another column may be an answer.
BESIDE_PROMPTS = {
    *("data_source", "ability", "reward_model", "extra_info", "ground_truth", "target", "agent_name", "index"),
    *("context_messages", "dataset", "source", "id", "uuid", "unique_id", "problem_id", "system"),
    *("level", "type", "subject", "difficulty", "label", "score", "reward", "acc"),
}


def why_unlabelled(row: dict) -> tuple[str, str] | None:
    """The problem and what to do; None for rows of another kind."""
    if isinstance(row.get("text"), str) and isinstance(row.get("label"), list):
        problem = "'label' rates the turns of 'text' by several attributes, none of which says right or wrong"
        return problem, "give 'prompt', 'completion' and 'label' (1/0), or pairs"
    rated = next((name for name in LABELS if row.get(name) is not None), None)
    prompt = next((name for name in NAMES if row.get(name) is not None), None)
    answers = answer_columns(row) or [name for name in LISTS if row.get(name)]
    if not answers and prompt in CONVERSATIONS and _ends_with_answer(row[prompt]):
        answers = [prompt]
    if prompt is None or (answers and prompt in answers and prompt not in CONVERSATIONS):
        return None
    if rated and answers:
        problem = f"{rated!r} is {fields.show(row[rated])}, which is no label of {answers[0]!r}"
        return problem, "a label is true/false, 1/0 (or -1); make it one, or give 'chosen' and 'rejected'"
    if any(name in row for name in REFERENCES) and set(answers) <= {"solution", "answer"} and answers:
        return f"problems with reference solutions ({answers[0]!r}) and no answers with labels", SAMPLE
    if answers:
        return f"answers ({answers[0]!r}) that have no label", ADD
    others = set(row) - BESIDE_PROMPTS - set(NAMES)
    return None if others else (f"prompts only ({prompt!r}), no answers", SAMPLE)


def _ends_with_answer(messages: object) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return isinstance(last, dict) and last.get("role", last.get("from")) in ("assistant", "gpt")
