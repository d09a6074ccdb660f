"""Replies of an OpenAI-compatible endpoint: each request once, within a rate and a budget of tokens.

The ``openai`` package sends the requests, and repeats those that fail or are refused for their rate, after growing
pauses or those that the endpoint asks for. Replies that could be used are kept on disk by the hash of their request.
"""

import asyncio
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any

from pipa_openrlhf.annotate.config import JudgeSettings
from pipa_openrlhf.errors import UserError, first_line

_TEMPLATE_TOKENS = 50  # at most, that an endpoint puts around a prompt; of the prompt itself one a byte
_NO_KEY = "none"  # the package wants one; an endpoint of one's own takes any


class Refused(Exception):
    """There is no usable reply to this request; others may go on."""


class OutOfBudget(Exception):
    """The request could cost more than is left of ``--judge.token_budget``."""


@dataclass(frozen=True)
class Reply:
    """What came back for a request.

    Attributes:
        digest: of the request.
        is_kept: it came from the disk.
    """

    text: str
    digest: str
    request: dict
    tokens: int
    is_kept: bool


class Endpoint:
    """A context within which an endpoint is asked.

    Raises:
        UserError: the ``openai`` package is missing.
    """

    def __init__(self, settings: JudgeSettings):
        try:
            import openai
        except ImportError:
            raise UserError("--annotate.method judge needs the openai package: pip install openai") from None
        self._openai, self._settings = openai, settings
        self._key = os.environ.get(settings.api_key_env) or None
        self._client: Any = None
        self._next_start = 0.0
        self._reserved = 0  # tokens that requests under way may cost
        self._freed = asyncio.Event()
        self.spent = 0
        self.asked = 0
        self.found = 0

    async def __aenter__(self) -> "Endpoint":
        settings = self._settings
        self._client = self._openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=self._key or _NO_KEY,
            max_retries=settings.retries,
            timeout=settings.timeout,
        )
        return self

    async def __aexit__(self, *error) -> None:
        await self._client.close()

    def summary(self) -> str:
        """What was asked and what it cost."""
        return (
            f"{self.asked} requests ({self.spent:,} tokens), {self.found} replies found in {self._settings.cache_dir}"
        )

    async def ask(self, prompt: str, attempt: int = 0) -> Reply:
        """The reply to ``prompt``, from the disk where it is kept.

        Args:
            attempt: another one is another request.

        Raises:
            Refused: after all retries there is none, or the endpoint does not take this request.
            OutOfBudget: it was not sent.
            UserError: the endpoint takes no request at all: wrong key, address or model.
        """
        request = self._request(prompt)
        identity = {"base_url": self._settings.base_url, "attempt": attempt, **request}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        kept = _read(self._path(digest))
        if kept is not None:
            self.found += 1
            return Reply(kept["reply"], digest, identity, kept["tokens"], is_kept=True)
        most = len(prompt.encode()) + _TEMPLATE_TOKENS + _longest_reply(request, self._settings.max_tokens)
        await self._reserve(most)
        try:
            await self._wait_for_turn()
            self.asked += 1
            text, used = await self._send(request)
            tokens = most if used is None else used
            self.spent += tokens
        finally:
            self._reserved -= most
            self._freed.set()
        return Reply(text, digest, identity, tokens, is_kept=False)

    def keep(self, reply: Reply) -> None:
        """Write a reply that could be used to the disk, whole or not at all."""
        if reply.is_kept:
            return
        path = self._path(reply.digest)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        unfinished = f"{path}.{os.getpid()}.unfinished"
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(
                {"request": reply.request, "reply": reply.text, "tokens": reply.tokens}, file, ensure_ascii=False
            )
        os.replace(unfinished, path)

    def _request(self, prompt: str) -> dict:
        settings = self._settings
        fields = {
            "model": settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens,
            **settings.more,
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _path(self, digest: str) -> str:
        return os.path.join(self._settings.cache_dir, digest[:2], f"{digest}.json")

    async def _reserve(self, tokens: int) -> None:
        """Wait until the request fits into the budget, whatever those under way cost."""
        budget = self._settings.token_budget
        while budget is not None and self.spent + self._reserved + tokens > budget:
            if self.spent + tokens > budget:
                raise OutOfBudget(f"--judge.token_budget {budget:,} is spent but for {budget - self.spent:,} tokens")
            self._freed.clear()
            await self._freed.wait()
        self._reserved += tokens

    async def _wait_for_turn(self) -> None:
        if self._settings.requests_per_minute is None:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self._next_start)
        self._next_start = start + 60 / self._settings.requests_per_minute
        await asyncio.sleep(start - now)

    async def _send(self, request: dict) -> tuple[str, int | None]:
        """The reply's text, and the tokens that it cost where the endpoint says so."""
        openai, model = self._openai, self._settings.model
        more = {name: value for name, value in request.items() if name not in ("model", "messages")}
        create = self._client.chat.completions.with_raw_response.create
        try:
            raw = await create(model=request["model"], messages=request["messages"], extra_body=more)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            reason = f"it refuses the key in ${self._settings.api_key_env}" if self._key else "it wants a key"
            raise UserError(f"{self._place}: {reason} ({self._said(error)}); set that variable") from None
        except openai.NotFoundError as error:
            raise UserError(
                f"{self._place}: it has no model {model!r} ({self._said(error)}); see --judge.model"
            ) from None
        except openai.APIError as error:
            raise Refused(self._said(error)) from None
        return _parse(raw.text)

    @property
    def _place(self) -> str:
        return f"--judge.base_url {self._settings.base_url}"

    def _said(self, error: Exception) -> str:
        """On one line, without the key, which some endpoints repeat."""
        text = first_line(error)
        return text.replace(self._key, "<key>") if self._key else text


def _longest_reply(request: dict, default: int) -> int:
    limits = [request.get(name) for name in ("max_tokens", "max_completion_tokens")]
    return max((one for one in limits if isinstance(one, int)), default=default)


def _parse(text: str) -> tuple[str, int | None]:
    """Text and cost of a reply. Raises Refused where it is none."""
    try:
        content = json.loads(text)
        reply = content["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise Refused(f"the reply is no chat completion: {text[:60]!r}") from None
    if not isinstance(reply, str):
        raise Refused("the reply has no text")
    usage = content.get("usage")
    used = usage.get("total_tokens") if isinstance(usage, dict) else None
    return reply, used if isinstance(used, int) and not isinstance(used, bool) and used >= 0 else None


def _read(path: str) -> dict | None:
    """A reply that was kept; None where there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return None
    whole = (
        isinstance(content, dict) and isinstance(content.get("reply"), str) and isinstance(content.get("tokens"), int)
    )
    return content if whole else None
