"""Comparisons of summaries: OpenAI's summarize_from_feedback."""

from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts import fields
from pipa_openrlhf.data.layouts.conversation import to_answer
from pipa_openrlhf.data.layouts.pairs import pair_records
from pipa_openrlhf.data.record import Record

COLUMNS = ("info", "summaries", "choice")
READING = "two summaries of a post (`info.post`, or `info.article`), the better one by `choice`, 0 or 1"
EXAMPLE = {"info": {"post": "1+1=2, as I found."}, "summaries": [{"text": " 1+1=3"}, {"text": " 1+1=2"}], "choice": 1}
POSTS = ("post", "article")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether there are summaries of which one was chosen, and what they are of."""
    return isinstance(row.get("info"), dict) and isinstance(row.get("summaries"), list) and "choice" in row


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """A pair."""
    info, summaries = fields.column(row, "info", where), fields.column(row, "summaries", where)
    if not isinstance(summaries, list) or len(summaries) != 2 or not isinstance(info, dict):
        fields.refuse(where, f"'summaries' is {fields.show(summaries)}", "give a list of two objects with 'text'")
    choice = fields.column(row, "choice", where)
    if isinstance(choice, bool) or choice not in (0, 1):
        fields.refuse(where, f"'choice' is {fields.show(choice)}", "give 0 or 1, the number of the better summary")
    name = next((name for name in POSTS if info.get(name)), POSTS[0])
    prompt = fields.text(info.get(name), f"info.{name}", where)
    answers = [to_answer(one["text"], f"summaries[{number}].text", where) for number, one in enumerate(summaries)]
    return pair_records(row, where, index, flags, prompt, answers[int(choice)], answers[1 - int(choice)])
