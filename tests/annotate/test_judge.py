"""Steps judged by a model at an endpoint: one on this machine that fails, refuses, and talks nonsense."""

import asyncio
import json
import signal
import threading
import time
from pathlib import Path

import pytest
from endpoint_server import EndpointServer, Reply
from tiny import flags, read_jsonl, run_in_process, start_module, write_jsonl

from pipa_openrlhf.annotate.answers import SampledAnswer, Verdict
from pipa_openrlhf.annotate.config import JudgeSettings
from pipa_openrlhf.annotate.endpoint import Endpoint
from pipa_openrlhf.annotate.judge import fill, read_template, read_verdict
from pipa_openrlhf.errors import UserError

KEY = "sk-very-secret-0123456789"
# The first wrong step is the one that says so, and the judge's reply names it.
ROWS = [
    {
        "problem_id": f"p{n}",
        "sample": 0,
        "prompt": f"{n}?",
        "completion": "good\nbad\nend",
        "label": False,
        "answer": "7",
    }
    for n in range(4)
]
VERDICT = "Step 1 is fine.\n\nFirst wrong step: 2"
NOW = {"retry-after-ms": "1"}


@pytest.fixture
def serve():
    servers = []

    def start(reply) -> EndpointServer:
        servers.append(EndpointServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def judge_flags(tmp_path, monkeypatch):
    """``judge_flags(url, changes)`` -> words of a command that judges ``ROWS``."""
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def make(url: str, **changes) -> list[str]:
        return flags(
            {
                "annotate.method": "judge",
                "annotate.input": write_jsonl(tmp_path / "answers.jsonl", ROWS),
                "annotate.output": tmp_path / "steps.jsonl",
                "judge.base_url": url,
                "judge.model": "the-judge",
                "judge.api_key_env": "JUDGE_KEY",
                "judge.cache_dir": tmp_path / "cache",
                **changes,
            }
        )

    return make


def one_error(capsys) -> str:
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert KEY not in line
    return line


def labels(tmp_path) -> list:
    return [(row["problem_id"], row["labels"], row["first_error"]) for row in read_jsonl(tmp_path / "steps.jsonl")]


ALL = [(f"p{n}", [True, False, False], 1) for n in range(4)]


def test_verdicts_become_rows_and_replies_are_kept(serve, judge_flags, tmp_path, capfd):
    server = serve(lambda request, number: Reply(VERDICT))
    words = judge_flags(server.url)
    assert run_in_process("annotate", *words) == 0
    assert labels(tmp_path) == ALL
    prompts = [request["messages"][0]["content"] for request in server.requests]
    assert sorted(prompts) == [fill(read_template(None), answer_of(row)) for row in ROWS]
    assert all("Step 2: bad\n" in prompt and "\n7\n" in prompt for prompt in prompts)
    assert all(
        (one["model"], one["temperature"], one["max_tokens"]) == ("the-judge", 0.0, 2048) for one in server.requests
    )
    assert set(server.keys) == {f"Bearer {KEY}"}
    assert "4 requests (400 tokens), 0 replies found" in capfd.readouterr().out

    before = (tmp_path / "steps.jsonl").read_bytes()
    assert run_in_process("annotate", *words) == 0  # finished: nothing is asked, nothing changes
    (tmp_path / "steps.jsonl").unlink(), (tmp_path / "steps.jsonl.settings.json").unlink()
    assert run_in_process("annotate", *words) == 0  # from the disk
    assert len(server.requests) == 4 and (tmp_path / "steps.jsonl").read_bytes() == before
    printed = capfd.readouterr()
    assert "0 requests (0 tokens), 4 replies found" in printed.out
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 6 and not any(KEY in text for text in (*written, printed.out, printed.err))
    assert (
        run_in_process("annotate", *words, "--judge.model", "another", "--annotate.output", str(tmp_path / "b")) == 0
    )
    assert len(server.requests) == 8, "another model is another request"


def answer_of(row: dict) -> SampledAnswer:
    return SampledAnswer(row["problem_id"], 0, row["prompt"], row["completion"].split("\n"), False, row["answer"], "")


def test_a_request_that_fails_is_sent_again(serve, judge_flags, tmp_path):
    troubles = [Reply(status=429, body="{}", headers=NOW), Reply(status=500, body="x", headers=NOW)]

    def reply(request: dict, number: int) -> Reply:
        return troubles[number] if number < len(troubles) else Reply(VERDICT)

    server = serve(reply)
    assert run_in_process("annotate", *judge_flags(server.url, **{"judge.concurrency": 1})) == 0
    assert labels(tmp_path) == ALL and len(server.requests) == 6
    assert server.requests[0] == server.requests[1] == server.requests[2]


GARBAGE = {
    "html": Reply(body="<html>busy</html>"),
    "no choices": Reply(body='{"choices": []}'),
    "a list": Reply(body="[1, 2]"),
    "no text": Reply(content=None),
    "half of it": Reply(body='{"choices": [{"mess'),
    "bad request": Reply(status=400, body='{"error": {"message": "context too long"}}'),
    "no verdict": Reply("I cannot tell."),
    "no such step": Reply("First wrong step: 4"),
    "still thinking": Reply("<think>First wrong step: 2"),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_an_answer_without_a_usable_reply_is_missing_until_there_is_one(serve, judge_flags, tmp_path, capsys, garbage):
    is_mended = False

    def reply(request: dict, number: int) -> Reply:
        return garbage if "\n2?\n" in request["messages"][0]["content"] and not is_mended else Reply(VERDICT)

    server = serve(reply)
    words = judge_flags(server.url)
    assert run_in_process("annotate", *words) == 1
    line = one_error(capsys)
    assert "1 answers have no verdict" in line and "answers.jsonl line 3: " in line and "goes on from here" in line
    assert sorted(labels(tmp_path)) == [ALL[0], ALL[1], ALL[3]]
    asked = len(server.requests)
    is_mended = True
    assert run_in_process("annotate", *words) == 0
    assert labels(tmp_path) == ALL and len(server.requests) == asked + 1


@pytest.mark.parametrize(
    "status, body, message",
    [
        (401, f'{{"error": {{"message": "Incorrect API key provided: {KEY}"}}}}', "refuses the key in $JUDGE_KEY"),
        (403, '{"error": {"message": "no"}}', "refuses the key in $JUDGE_KEY"),
        (404, '{"error": {"message": "unknown"}}', "no model 'the-judge'"),
    ],
)
def test_what_no_request_can_pass_ends_the_command_at_once(serve, judge_flags, capfd, tmp_path, status, body, message):
    server = serve(lambda request, number: Reply(status=status, body=body))
    assert run_in_process("annotate", *judge_flags(server.url, **{"judge.concurrency": 1})) == 1
    printed = capfd.readouterr()
    assert message in printed.err and KEY not in printed.err + printed.out
    assert len(server.requests) == 1


def test_without_a_key_none_is_sent_but_a_word(serve, judge_flags, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda request, number: Reply(VERDICT))
    assert run_in_process("annotate", *judge_flags(server.url)) == 0
    assert set(server.keys) == {"Bearer none"}


def test_an_endpoint_that_does_not_answer_is_named(judge_flags, capsys):
    assert run_in_process("annotate", *judge_flags("http://127.0.0.1:9/v1", **{"judge.retries": 0})) == 1
    assert "4 answers have no verdict" in (line := one_error(capsys)) and "Connection error" in line


def test_one_failure_after_the_other_stops(serve, judge_flags, tmp_path, capsys):
    many = [{**ROWS[0], "problem_id": str(n), "prompt": str(n)} for n in range(60)]
    server = serve(lambda request, number: Reply("?"))
    words = judge_flags(server.url, **{"judge.attempts": 1, "judge.concurrency": 1})
    write_jsonl(tmp_path / "answers.jsonl", many)
    assert run_in_process("annotate", *words) == 1
    line = one_error(capsys)
    assert "60 answers have no verdict" in line and "20 answers in a row" in line
    assert len(server.requests) == 20


def test_the_budget_is_never_passed_and_a_larger_one_goes_on(serve, judge_flags, tmp_path, capsys):
    server = serve(lambda request, number: Reply(VERDICT, tokens=400))
    longest = max(len(fill(read_template(None), answer_of(row)).encode()) for row in ROWS) + 50 + 10
    limits = {"judge.max_tokens": 10, "judge.token_budget": 400 + longest}
    assert run_in_process("annotate", *judge_flags(server.url, **limits)) == 1
    assert "2 answers have no verdict: stopped: --judge.token_budget" in one_error(capsys)
    assert len(server.requests) == 2 and server.most_at_once == 1, "the second had to wait for the cost of the first"
    more = {**limits, "judge.token_budget": 10_000}
    assert run_in_process("annotate", *judge_flags(server.url, **more)) == 0
    assert labels(tmp_path) == ALL and len(server.requests) == 4


def test_as_many_requests_at_a_time_as_are_allowed(serve, judge_flags, tmp_path):
    meeting = threading.Barrier(2)

    def reply(request: dict, number: int) -> Reply:
        meeting.wait(timeout=60)  # until there are two
        return Reply(VERDICT)

    server = serve(reply)
    assert run_in_process("annotate", *judge_flags(server.url, **{"judge.concurrency": 2})) == 0
    assert labels(tmp_path) == ALL and server.most_at_once == 2


def test_requests_begin_as_far_apart_as_the_rate_says(monkeypatch, tmp_path):
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def three() -> None:
        endpoint = Endpoint(JudgeSettings(model="m", requests_per_minute=120, cache_dir=str(tmp_path)))
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 1000.0)
        for _ in range(3):
            await endpoint._wait_for_turn()

    monkeypatch.setattr("pipa_openrlhf.annotate.endpoint.asyncio.sleep", sleep)
    asyncio.run(three())
    assert slept == [0.0, 0.5, 1.0]


def test_further_fields_and_fields_taken_out(serve, judge_flags):
    server = serve(lambda request, number: Reply(VERDICT))
    body = '{"temperature": null, "max_tokens": null, "max_completion_tokens": 99, "reasoning_effort": "low"}'
    assert run_in_process("annotate", *judge_flags(server.url, **{"judge.body": body})) == 0
    names = {"model", "messages", "max_completion_tokens", "reasoning_effort"}
    assert all(set(request) == names and request["max_completion_tokens"] == 99 for request in server.requests)


def test_a_damaged_reply_on_the_disk_is_asked_for_again(serve, judge_flags, tmp_path):
    server = serve(lambda request, number: Reply(VERDICT))
    assert run_in_process("annotate", *judge_flags(server.url)) == 0
    kept = sorted((tmp_path / "cache").rglob("*.json"))
    for path, content in zip(kept, ("", "{", '{"reply": 3}', "[]"), strict=True):
        path.write_text(content)
    assert run_in_process("annotate", *judge_flags(server.url, **{"annotate.output": tmp_path / "again"})) == 0
    assert len(server.requests) == 8 and len(read_jsonl(tmp_path / "again")) == 4


def test_ctrl_c_loses_nothing_that_came(serve, judge_flags, tmp_path):
    hang = threading.Event()

    def reply(request: dict, number: int) -> Reply:
        if number >= 2:
            hang.wait(timeout=60)
        return Reply(VERDICT)

    server = serve(reply)
    words = judge_flags(server.url, **{"judge.concurrency": 1})
    process = start_module("annotate", *words)
    end = time.monotonic() + 120
    while len(server.requests) < 3 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    hang.set()
    assert process.returncode == 130, errors
    assert errors.rstrip().endswith("interrupted") and "Traceback" not in errors and "2 requests" not in errors
    assert labels(tmp_path) == ALL[:2]
    assert run_in_process("annotate", *words) == 0
    assert labels(tmp_path) == ALL and len(server.requests) == 5


@pytest.mark.parametrize(
    "reply, first_error",
    [
        ("First wrong step: 1", 0),
        ("first wrong step: **3**", 2),
        ("**First wrong step:** none.", -1),
        ("First wrong step: None", -1),
        ("First wrong step: -1", -1),
        ("First wrong step: 1? No.\nFirst wrong step: 2", 1),
        ("<think>First wrong step: 1</think>\nFirst wrong step: 3", 2),
        ("First wrong step: 3\n<think>First wrong step: 1</think>", 2),
        ("<think>First wrong step: 1", None),
        ("First wrong step: 0", None),
        ("First wrong step: 4", None),
        ("First wrong step:", None),
        ("The first step is wrong", None),
        ("", None),
        ("First wrong step: No. 2", 1),
        ("First wrong step: no.", -1),
    ],
)
def test_what_a_reply_says(reply, first_error):
    found = read_verdict(reply, 3)
    assert found == (None if first_error is None else Verdict(first_error))


def test_a_prompt_of_ones_own(tmp_path):
    (tmp_path / "prompt.txt").write_text('{question}|{steps}|{reference}|{"json": 1}')
    answer = SampledAnswer("p", 0, "{steps}?", ["{reference}", "b"], None, None, "")
    template = read_template(str(tmp_path / "prompt.txt"))
    assert fill(template, answer) == '{steps}?|Step 1: {reference}\nStep 2: b|not known|{"json": 1}'
    for content, message in ((b"{question}", "it has no {steps}"), (b"", "no {question} and"), (b"\xff", "not UTF-8")):
        (tmp_path / "prompt.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_template(str(tmp_path / "prompt.txt"))


def test_the_prompt_that_comes_with_the_package_is_packaged():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"annotate/*.txt"' in text and "{steps}" in read_template(None)
    assert json.dumps(read_template(None)).isascii()
