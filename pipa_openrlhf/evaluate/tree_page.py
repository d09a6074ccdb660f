"""The tree of a search as a nested list in HTML: a line a candidate, coloured by its value."""

import html
import json
import math

from pipa_openrlhf.errors import UserError

STYLE = """
ul.tree, ul.tree ul { list-style: none; padding-left: 1.2rem; border-left: 1px solid #ddd; font-size: .85rem; }
ul.tree li.over { color: #888; } ul.tree li.answer > .step { font-weight: bold; }
ul.tree .step { white-space: pre-wrap; font-family: monospace; } ul.tree .fate { font-style: italic; }
ul.tree .value { padding: 0 .3rem; margin-right: .4rem; color: #222; }
"""
_ON_THE_WAY = ("root", "kept", "finished")


def read_tree(path: str) -> dict:
    """A tree that ``evaluate --sbs.tree_dir`` wrote.

    Raises:
        UserError: the file is none.
    """
    try:
        with open(path, encoding="utf-8") as file:
            tree = json.load(file)
        if not (tree["nodes"] and {"parent", "text", "value", "fate"} <= tree["nodes"][0].keys()):
            raise KeyError("nodes")
        return tree
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--report.trees {path}: not a tree that evaluate wrote with --sbs.tree_dir") from error


def tree_html(tree: dict) -> str:
    """Candidates below what they continue, in the order in which they were drawn; the answer's steps in bold."""
    nodes = tree["nodes"]
    children: dict[int | None, list[int]] = {}
    for number, node in enumerate(nodes):
        children.setdefault(node["parent"], []).append(number)
    way, at = set(), tree["answer"]
    while at is not None:
        way.add(at)
        at = nodes[at]["parent"]

    def line(number: int) -> str:
        node = nodes[number]
        kinds = [*["answer"] * (number in way), *["over"] * (node["fate"] not in _ON_THE_WAY)]
        value = f'<span class="value" style="background:{_colour(node["value"], tree)}">{node["value"]:.3f}</span>'
        text = html.escape(tree["question"] if number == 0 else node["text"].strip("\n"))
        below = "".join(map(line, children.get(number, [])))
        return (
            f'<li class="{" ".join(kinds)}">{value}<span class="step">{text}</span> '
            f'<span class="fate">{html.escape(node["fate"])}</span>{f"<ul>{below}</ul>" if below else ""}</li>'
        )

    return f'<ul class="tree">{line(0)}</ul>'


def _colour(value: float, tree: dict) -> str:
    """Of its value; a mean log-prob as the probability that it is of. Grey where nothing ranked."""
    if tree["ranked_by"] == "none":
        return "#eee"
    return value_colour(min(1.0, math.exp(value) if tree["ranked_by"] == "logprob" else value))


def value_colour(share: float) -> str:
    """From red at 0 over yellow to green at 1."""
    return f"hsl({120 * share:.0f} 60% 80%)"
