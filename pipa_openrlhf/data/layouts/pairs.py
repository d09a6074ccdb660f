"""What every layout of pairs shares: two answers to one prompt, made into two records."""

from dataclasses import replace

from pipa_openrlhf.config import DataConfig
from pipa_openrlhf.data.layouts.conversation import Answer, join, make_record
from pipa_openrlhf.data.layouts.dialogue import as_messages, human_turns, is_dialogue
from pipa_openrlhf.data.layouts.shared_prompt import take_prompt
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

    Without a prompt, and for whole conversations, it is what both sides begin with: see ``shared_prompt.py``.

    Args:
        complete: False: the sides are the next step of an answer that goes on, so that no label of a whole answer is
            known: only which side it is.
    """
    if isinstance(prompt, str) and is_dialogue(prompt, open_end=True):
        chosen, rejected = _without_dialogue(prompt, chosen), _without_dialogue(prompt, rejected)
        prompt = as_messages(prompt) if flags.apply_chat_template else prompt
    without_prompt = prompt is None
    if flags.apply_chat_template and prompt is None:
        chosen, rejected = _from_dialogue(chosen), _from_dialogue(rejected)
    whole = all(one.messages is not None and one.messages[0]["role"] != "assistant" for one in (chosen, rejected))
    if prompt is None or (whole and flags.apply_chat_template):
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
            masked_spans=_others_turns(answer) if without_prompt else (),
        )
        for side, answer, step_labels in ((1, chosen, chosen_labels), (0, rejected, rejected_labels))
    ]


def _without_dialogue(prompt: str, answer: Answer) -> Answer:
    """The answer alone, where the dialogue before it is written twice."""
    if answer.messages is not None or not answer.steps[0].startswith(prompt) or answer.steps[0] == prompt:
        return answer
    return replace(answer, steps=[answer.steps[0][len(prompt) :], *answer.steps[1:]])


def _from_dialogue(answer: Answer) -> Answer:
    if answer.messages is not None or len(answer.steps) > 1 or not is_dialogue(answer.steps[0]):
        return answer
    messages = as_messages(answer.steps[0])
    return Answer(answer.name, [messages[-1]["content"]], messages)


def _others_turns(answer: Answer) -> tuple[tuple[int, int, int], ...]:
    """What the human says within one side of a dialogue written as text, whose sides part before its last turn."""
    if answer.messages is not None or len(answer.steps) > 1:
        return ()
    return tuple((0, start, end) for start, end in human_turns(answer.steps[0]))
