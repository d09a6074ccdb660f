"""What every layout of pairs shares: two answers to one prompt, made into two records."""

from pipa_openrlhf.data import fields
from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record, to_answer
from pipa_openrlhf.data.layouts.dialogue import as_messages, is_dialogue, style_of, turns_of_others
from pipa_openrlhf.data.layouts.prompts import prompt_column
from pipa_openrlhf.data.layouts.shared_prompt import after, take_prompt
from pipa_openrlhf.data.record import FROM_SIDE, Record


def pair_records(
    row: dict,
    where: str,
    index: int,
    flags: DataConfig,
    prompt: str | list[dict] | None,
    chosen: Answer,
    rejected: Answer,
    *,
    chosen_labels: list[int | None] | None = None,
    rejected_labels: list[int | None] | None = None,
    prefix: str = "",
    complete: bool = True,
) -> list[Record]:
    """The chosen and the rejected record of one row.

    Without a prompt, and for whole conversations, it is what both sides begin with: see ``shared_prompt.py``. What
    others say within a side, as in dialogues that part before their last turn, is outside every loss.

    Args:
        complete: False: the sides are the next step of an answer that goes on, so that no label of a whole answer is
            known: only which side it is.
    """
    if flags.apply_chat_template and _may_be_dialogues(row, flags):
        chosen, rejected = _from_dialogue(chosen, where), _from_dialogue(rejected, where)
    if isinstance(prompt, str):
        chosen, rejected = _not_repeating(prompt, chosen, rejected)
    if prompt is None or (is_whole(chosen) and is_whole(rejected) and flags.apply_chat_template):
        prompt, chosen, rejected = take_prompt(row, prompt, chosen, rejected, flags, where)
    return [
        make_record(
            row,
            where,
            join(prompt, answer, flags, where, prefix),
            step_labels=step_labels,
            answer_label=side if complete else None,
            label_source=FROM_SIDE,
            complete=complete,
            pair_id=index,
            side=side,
            masked_spans=_masked(prompt, answer, where),
        )
        for side, answer, step_labels in ((1, chosen, chosen_labels), (0, rejected, rejected_labels))
    ]


def is_whole(answer: Answer) -> bool:
    """Whether it is a whole conversation, which begins with the prompt."""
    return answer.messages is not None and answer.messages[0]["role"] != "assistant"


def _may_be_dialogues(row: dict, flags: DataConfig) -> bool:
    """Whether there is no prompt, or one in that style: an answer to another may be a dialogue for its own sake."""
    name = prompt_column(row, flags)
    prompt = None if name is None else row.get(name)
    return prompt is None or (isinstance(prompt, str) and is_dialogue(prompt, open_end=True))


def _from_dialogue(answer: Answer, where: str) -> Answer:
    """Messages for the turns of a dialogue written as text."""
    if answer.messages is not None or len(answer.steps) > 1 or not is_dialogue(answer.steps[0]):
        return answer
    return to_answer(as_messages(answer.steps[0]), answer.name, where)


def _not_repeating(prompt: str, chosen: Answer, rejected: Answer) -> tuple[Answer, Answer]:
    """The sides without the dialogue that they both begin with, where it is the prompt too."""
    repeated = (one.messages is None and one.steps[0].startswith(prompt) for one in (chosen, rejected))
    if style_of(prompt) is None or not all(repeated):
        return chosen, rejected
    return after(chosen, len(prompt)), after(rejected, len(prompt))


def _masked(prompt: str | list[dict] | None, answer: Answer, where: str) -> tuple[tuple[int, int, int], ...]:
    """Turns of others within an answer, after which one of the model's must follow."""
    if not isinstance(prompt, str) or answer.messages is not None or len(answer.steps) > 1:
        return ()
    style = style_of(prompt)
    if style is None:
        return ()
    turns = turns_of_others(answer.steps[0], style)
    if not answer.steps[0][turns[-1][1] if turns else 0 :].strip():
        problem = f"{answer.name!r} ends where its answer should begin"
        fields.refuse(where, problem, "give it an answer or remove the row")
    return tuple((0, start, end) for start, end in turns)
