"""Step labels by a language model that is asked for the first wrong step of an answer."""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files

from tqdm import tqdm

from pipa_openrlhf.annotate.answers import NO_ERROR, SampledAnswer, Verdict
from pipa_openrlhf.annotate.config import JudgeSettings
from pipa_openrlhf.annotate.endpoint import Endpoint, OutOfBudget, Refused
from pipa_openrlhf.errors import UserError

_PLACES = re.compile(r"\{(question|steps|reference)\}")
_NEEDED = ("question", "steps")
_NO_REFERENCE = "not known"
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_VERDICT = re.compile(r"first wrong step[^\w-]*(?:no\. ?)?(none|no\b|-1|\d+)", re.IGNORECASE)
# So many answers without a verdict, one after another, say that something is wrong with the endpoint or the prompt.
_MOST_FAILURES = 20


@dataclass
class Judging:
    """What became of the answers.

    Attributes:
        judged: answers with a verdict.
        failures: places of the others that were asked about, with the reason.
        stopped: why the rest was not asked about; None: all were.
    """

    judged: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)
    stopped: str | None = None


def judge_by_model(
    answers: list[SampledAnswer], settings: JudgeSettings, on_verdict: Callable[[SampledAnswer, Verdict], None]
) -> Judging:
    """Ask about every answer; ``on_verdict`` is called with each as soon as it is known, in any order.

    Raises:
        UserError: the prompt cannot be used, or the endpoint takes no request of this kind.
    """
    template = read_template(settings.prompt)
    endpoint = Endpoint(settings)
    try:
        return asyncio.run(_judge_all(answers, settings, template, endpoint, on_verdict))
    finally:
        print(endpoint.summary(), flush=True)


async def _judge_all(
    answers: list[SampledAnswer],
    settings: JudgeSettings,
    template: str,
    endpoint: Endpoint,
    on_verdict: Callable[[SampledAnswer, Verdict], None],
) -> Judging:
    result = Judging()
    waiting = iter(answers)
    in_a_row = 0

    async def work(bar: tqdm) -> None:
        nonlocal in_a_row
        for answer in waiting:  # shared: each worker takes the next one
            if result.stopped is not None:
                return
            try:
                on_verdict(answer, await _ask(answer, settings.attempts, template, endpoint))
            except OutOfBudget as reason:
                result.stopped = str(reason)
            except Refused as reason:
                result.failures.append((answer.where, str(reason)))
                in_a_row += 1
                if in_a_row >= _MOST_FAILURES:
                    result.stopped = f"{in_a_row} answers in a row got no verdict"
            else:
                result.judged += 1
                in_a_row = 0
                bar.update()

    with tqdm(total=len(answers), desc="judging", unit="answer", dynamic_ncols=True) as bar:
        async with endpoint:
            tasks = [asyncio.create_task(work(bar)) for _ in range(settings.concurrency)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    return result


async def _ask(answer: SampledAnswer, attempts: int, template: str, endpoint: Endpoint) -> Verdict:
    """Raises Refused where no attempt gave a verdict."""
    prompt = fill(template, answer)
    for attempt in range(attempts):
        reply = await endpoint.ask(prompt, attempt)
        verdict = read_verdict(reply.text, len(answer.steps))
        if verdict is not None:
            endpoint.keep(reply)
            return verdict
    raise Refused(f"no reply says `First wrong step: ` and none or a number from 1 to {len(answer.steps)}")


def read_template(path: str | None) -> str:
    """The prompt's text with its places.

    Raises:
        UserError: the file cannot be read as text, or lacks a place.
    """
    if path is None:
        return files(__package__).joinpath("judge_prompt.txt").read_text(encoding="utf-8")
    try:
        with open(path, encoding="utf-8") as file:
            template = file.read()
    except UnicodeDecodeError as error:
        raise UserError(f"--judge.prompt {path}: not UTF-8 text; give a text file") from error
    missing = [f"{{{name}}}" for name in _NEEDED if f"{{{name}}}" not in template]
    if missing:
        raise UserError(f"--judge.prompt {path}: it has no {' and no '.join(missing)}; write where they go")
    return template


def fill(template: str, answer: SampledAnswer) -> str:
    """The prompt of one answer. Braces in what is filled in stay as they are."""
    steps = "\n".join(f"Step {number}: {step}" for number, step in enumerate(answer.steps, start=1))
    texts = {"question": answer.question, "steps": steps, "reference": answer.gold or _NO_REFERENCE}
    return _PLACES.sub(lambda place: texts[place[1]], template)


def read_verdict(reply: str, num_steps: int) -> Verdict | None:
    """What the last ``First wrong step: `` of a reply says, outside its thoughts; None where that is no step."""
    found = _VERDICT.findall(_THOUGHTS.sub("", reply))
    if not found:
        return None
    if not found[-1].isdigit():
        return Verdict(NO_ERROR)
    number = int(found[-1])
    return Verdict(number - 1) if 1 <= number <= num_steps else None
