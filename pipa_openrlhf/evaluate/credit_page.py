"""Answers to one problem side by side in HTML: their tokens coloured by g and by r, below each step its label."""

import html
import json
from collections.abc import Sequence
from itertools import groupby

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.evaluate.tree_page import value_colour

STYLE = """
.credit .prompt { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 12rem; overflow-y: auto;
  background: #f6f6f6; padding: .6rem .8rem; font-size: .9rem; }
.credit .answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
.credit .answer { min-width: 0; border: 1px solid #ddd; border-radius: 6px; padding: .2rem .9rem .6rem; }
.credit h3 { font-size: 1rem; margin: .6rem 0; } .credit h4 { font-size: .8rem; color: #555; margin: .9rem 0 .3rem; }
.credit .badge { font-weight: normal; font-size: .8rem; padding: .1rem .5rem; margin-left: .5rem; }
.credit .badge.right { background: #d9f0dd; } .credit .badge.wrong { background: #f8dcd6; }
.credit .tokens { font: .85rem/1.5 ui-monospace, monospace; }
.credit .step { display: inline-block; vertical-align: top; max-width: 100%; margin-bottom: .5rem; }
.credit .words { display: block; white-space: pre-wrap; overflow-wrap: anywhere; border-bottom: 3px solid #bbb; }
.credit .step.right .words { border-color: #3c8d4f; } .credit .step.wrong .words { border-color: #c0472f; }
.credit .token { border-radius: 2px; box-shadow: inset -1px 0 0 #fff; }
.credit .sign { display: block; font: .7rem/1.4 system-ui, sans-serif; color: #555; text-align: center; }
.credit .step.right .sign { color: #2c6b3b; } .credit .step.wrong .sign { color: #a03a26; }
.credit .scale span { padding: 0 .4rem; font: .75rem/1.6 system-ui, sans-serif; }
"""
_SIGNS = {1: ("right", "✓"), 0: ("wrong", "✗"), None: ("unlabelled", "·")}
_SHORT = 8  # characters of a step that has room for a sign alone
_LEAST_SCALE = 0.1  # nats: below that differences are mostly rounding


def read_credit(path: str) -> list[dict]:
    """Rows that ``cli.credit`` wrote.

    Raises:
        UserError: the file is none of its.
    """
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        for row in rows:
            if not ({"problem_id", "prompt", "label"} <= row.keys() and row["tokens"][0].keys() >= {"g", "r", "step"}):
                raise KeyError("tokens")
        return rows
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"--report.credit {path}: not a file that cli.credit wrote") from error


def by_problem(files: dict[str, list[dict]]) -> dict[str, list[tuple[str, dict]]]:
    """Answers of all files, with the file's name, by problem."""
    problems: dict[str, list[tuple[str, dict]]] = {}
    for name, rows in files.items():
        for row in rows:
            problems.setdefault(row["problem_id"], []).append((name, row))
    return problems


def problem_html(answers: Sequence[tuple[str, dict]]) -> str:
    """The answers to one problem, two or more of them side by side, on one scale of colours."""
    ratios = [abs(token["r"]) for _, row in answers for token in row["tokens"] if token["r"] is not None]
    scale = max([_LEAST_SCALE, *ratios])
    cards = "".join(_answer(name, row, scale) for name, row in answers)
    prompt = html.escape(answers[0][1]["prompt"].strip("\n"))
    parts = f'<div class="prompt">{prompt}</div>{_legend(scale)}<div class="answers">{cards}</div>'
    return f'<div class="credit">{parts}</div>'


def _legend(scale: float) -> str:
    values = [(f"{g:g}", value_colour(g)) for g in (0.0, 0.25, 0.5, 0.75, 1.0)]
    shares = (-1.0, -0.5, 0.0, 0.5, 1.0)
    ratios = [(f"{share * scale:+.2g}" if share else "0", _ratio_colour(share)) for share in shares]
    swatches = [
        "".join(f'<span style="background:{colour}">{text}</span>' for text, colour in shown)
        for shown in (values, ratios)
    ]
    return f'<p class="scale">g {swatches[0]} &emsp; r {swatches[1]}</p>'


def _answer(name: str, row: dict, scale: float) -> str:
    tokens, label = row["tokens"], "right" if row["label"] else "wrong"
    values = [token["g"] for token in tokens if token["g"] is not None]
    ratios = [token["r"] for token in tokens if token["r"] is not None]
    parts = [f'<h3>{html.escape(name)}<span class="badge {label}">{label}</span></h3>']
    if values:
        parts.append(f"<h4>g, before each token: mean {sum(values) / len(values):.2f}</h4>{_tokens(tokens, None)}")
    parts.append(f"<h4>r, log policy - log prior: sum {sum(ratios):+.2f}</h4>{_tokens(tokens, scale)}")
    return f'<div class="answer">{"".join(parts)}</div>'


def _tokens(tokens: list[dict], scale: float | None) -> str:
    """Args: scale: the r of full colour; None: coloured by g."""
    steps = (_step(number, list(of_step), scale) for number, of_step in groupby(tokens, key=lambda one: one["step"]))
    return f'<div class="tokens">{"".join(steps)}</div>'


def _step(number: int, tokens: list[dict], scale: float | None) -> str:
    labels = [token["label"] for token in tokens if token["label"] is not None]
    kind, sign = _SIGNS[labels[-1] if labels else None]
    text = "".join(token["text"] for token in tokens)
    caption = sign if len(text.strip()) < _SHORT else f"{sign} step {number + 1}: {kind}"
    words = "".join(_token(token, scale) for token in tokens)
    # A step is a box with its label below: line ends at its edges are line ends between boxes.
    before, after = ("<br>" if at_edge else "" for at_edge in (text.startswith("\n"), text.endswith("\n")))
    if before:
        words = words.replace("↵\n", "↵", 1)
    if after:
        words = "↵".join(words.rsplit("↵\n", 1))
    box = f'<span class="words">{words}</span><span class="sign">{caption}</span>'
    return f'{before}<span class="step {kind}">{box}</span>{after}'


def _token(token: dict, scale: float | None) -> str:
    number = token["g"] if scale is None else token["r"]
    # The first token of a sequence that has no prompt is judged by nothing.
    colour = "none"
    if number is not None:
        colour = value_colour(number) if scale is None else _ratio_colour(number / scale)
    known = [f"{name} {token[name]:{form}}" for name, form in (("g", ".3f"), ("r", "+.3f")) if token[name] is not None]
    title = html.escape(", ".join([*known, _SIGNS[token["label"]][0]]))
    text = html.escape(token["text"]).replace("\n", "↵\n")
    return f'<span class="token" style="background:{colour}" title="{title}">{text}</span>'


def _ratio_colour(share: float) -> str:
    """From orange at -1 over white at 0 to blue at 1."""
    return f"hsl({215 if share > 0 else 25} 85% {100 - 32 * min(1.0, abs(share)):.0f}%)"
