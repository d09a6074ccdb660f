"""Two summaries of one text and which is better: OpenAI's summarize_from_feedback."""

from pipa_openrlhf.data import fields
from pipa_openrlhf.data.config import DataConfig
from pipa_openrlhf.data.layouts.compared import by_index
from pipa_openrlhf.data.layouts.conversation import to_answer
from pipa_openrlhf.data.layouts.pairs import pair_records
from pipa_openrlhf.data.record import Record

COLUMNS = ("info", "summaries", "choice")
READING = (
    "two summaries, the better one by its number in `choice`; the prompt is the post or the article as it is, around "
    'which `--data.input_template "{}\\n\\nTL;DR:"` puts the task'
)
EXAMPLE = {"info": {"post": "1+1 is 2."}, "summaries": [{"text": " It is 3."}, {"text": " It is 2."}], "choice": 1}
SOURCES = ("post", "article")


def fits(row: dict, flags: DataConfig) -> bool:
    """Whether there are two summaries, a choice and what they are of."""
    info, summaries = row.get("info"), row.get("summaries")
    two = isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(one, dict) for one in summaries)
    return two and "choice" in row and isinstance(info, dict) and any(name in info for name in SOURCES)


def read(row: dict, where: str, index: int, flags: DataConfig) -> list[Record]:
    """``{info: {post}, summaries: [{text}, {text}], choice}``."""
    info, summaries = fields.column(row, "info", where), fields.column(row, "summaries", where)
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        fields.refuse(where, "'info' or 'summaries' is not the published one", "give two summaries and their post")
    name = next((name for name in SOURCES if info.get(name) is not None), SOURCES[0])
    prompt = fields.text(info.get(name), f"info.{name}", where)
    better = by_index(fields.column(row, "choice", where), "choice", where)
    answers = [to_answer(one.get("text"), f"summaries[{n}].text", where) for n, one in enumerate(summaries)]
    return pair_records(row, where, index, flags, prompt, answers[better], answers[1 - better])
