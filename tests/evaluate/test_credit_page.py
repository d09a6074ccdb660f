"""The page of tokens: what stands in it, that data stay text, and how a real browser shows it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from pipa_openrlhf.cli.entry import run
from pipa_openrlhf.cli.report import main
from pipa_openrlhf.evaluate.credit_page import by_problem, problem_html

HOSTILE = "<script>window.open('hacked')</script> & \"quotes\" </span>"
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


def token(text, step, label, g, r):
    return {"text": text, "step": step, "label": label, "g": g, "r": r}


def answer(problem_id="7", right=False, more=(), **changes):
    tokens = [
        token("1 + 1", 0, 1, 0.9, 0.5),
        token(" = 2\n", 0, 1, 0.75, 1.0),
        token("2 + 2 = 5", 1, int(right), 0.25, -2.0),
        token("<|im_end|>", 1, int(right), 0.5, 0.0),
        *more,
    ]
    return {"problem_id": problem_id, "prompt": "What?\n", "label": int(right), "tokens": tokens, **changes}


def tokens_of(page):
    """``(background, title, text)`` of every token of a page."""
    return re.findall(r'<span class="token" style="background:(.*?)" title="(.*?)">(.*?)</span>', page, re.DOTALL)


def test_tokens_are_coloured_by_g_and_by_r_on_one_scale():
    page = problem_html([("A", answer()), ("B", answer(right=True))])
    found = tokens_of(page)
    assert len(found) == 16, "two answers of four tokens, by g and by r"
    by_g, by_r = found[:4], found[4:8]
    assert [one[0] for one in by_g] == [f"hsl({hue} 60% 80%)" for hue in (108, 90, 30, 60)]
    # Of the largest |r|, 2: a quarter and a half in blue, all of it in orange.
    assert [one[0] for one in by_r] == [
        "hsl(215 85% 92%)",
        "hsl(215 85% 84%)",
        "hsl(25 85% 68%)",
        "hsl(25 85% 100%)",
    ]
    assert by_g[0][1:] == ("g 0.900, r +0.500, right", "1 + 1")
    assert by_g[2][1:] == ("g 0.250, r -2.000, wrong", "2 + 2 = 5")
    assert "mean 0.60" in page and "sum -0.50" in page


def test_the_label_of_a_step_stands_under_it():
    page = problem_html([("A", answer(more=[token(" x", 2, None, 0.5, 0.0)]))])
    boxes = re.findall(
        r'<span class="step (\w+)"><span class="words">.*?<span class="sign">(.*?)</span>', page, re.DOTALL
    )
    assert boxes[:3] == [("right", "✓ step 1: right"), ("wrong", "✗ step 2: wrong"), ("unlabelled", "·")]


def test_a_line_end_that_closes_a_step_stands_between_the_boxes():
    rows = answer(more=[token("\nthree\nfour\n\n", 2, 1, 0.5, 0.0)])
    page = problem_html([("A", rows)])
    texts = [text for *_, text in tokens_of(page)]
    assert texts[1] == " = 2↵" and texts[4] == "↵three↵\nfour↵\n↵"
    # By g and by r: after the first step, before the third and after it.
    assert page.count("<br>") == 6 and page.count('<br><span class="step') == 4


def test_answers_without_a_value_head_have_r_alone():
    rows = answer()
    for one in rows["tokens"]:
        one["g"] = None
    page = problem_html([("A", rows)])
    assert len(tokens_of(page)) == 4 and "before each token" not in page
    assert tokens_of(page)[0][1] == "r +0.500, right"


def test_a_first_token_that_nothing_precedes_has_no_colour():
    rows = answer()
    rows["tokens"][0] |= {"g": None, "r": None, "label": None}
    assert [one[:2] for one in tokens_of(problem_html([("A", rows)]))][::4] == [("none", "unlabelled")] * 2


def test_answers_to_one_problem_stand_side_by_side():
    files = {"A": [answer("7"), answer("8")], "B": [answer("8"), answer("9")]}
    assert {key: [name for name, _ in rows] for key, rows in by_problem(files).items()} == {
        "7": ["A"],
        "8": ["A", "B"],
        "9": ["B"],
    }


@pytest.fixture
def page(tmp_path):
    """Path of a report of two models' answers to a problem, all its texts hostile, one of them long."""
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    row = {"problem_id": "1", "right": True, "predicted": "1", "finished": True}
    (evaluation / "results.jsonl").write_text(json.dumps(row))
    (evaluation / "summary.json").write_text('{"accuracy": 1, "interval_95": [0.5, 1], "n": 1}')
    long = [token(f" {'long' * 60} word", 2, 1, 0.5, 0.1) for _ in range(6)]
    rows = {
        "a": answer(HOSTILE, prompt=HOSTILE + "?" * 400, more=[token(HOSTILE, 1, 0, 0.1, -1.0)]),
        "b": answer(HOSTILE, right=True, more=long),
    }
    for name, one in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(one) + "\n")
    path = tmp_path / "report.html"
    words = ["--report.evaluations", f"a={evaluation}", "--report.output", str(path), "--report.credit"]
    assert run(main, "report", [*words, f"{HOSTILE}={tmp_path / 'a.jsonl'}", f"B={tmp_path / 'b.jsonl'}"]) == 0
    return path


def test_texts_of_data_stay_text(page):
    class Tags(HTMLParser):
        seen: set[str] = set()

        def handle_starttag(self, tag, attrs):
            self.seen.add(tag)
            assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs if tag != "use")

    text = page.read_text()
    credit = text[text.index('<div class="credit">') :]
    Tags().feed(credit)
    assert Tags.seen == {"div", "p", "span", "h3", "h4", "br"}
    assert "<script" not in text and "hacked" in text


def test_other_files_are_refused(page, tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text('{"problem_id": "1"}\n')
    (tmp_path / "empty.jsonl").write_text(json.dumps(answer(tokens=[])))
    evaluation = ["--report.evaluations", f"a={page.parent / 'evaluation'}", "--report.credit"]
    capsys.readouterr()
    for word in (f"A={tmp_path / 'x.jsonl'}", f"A={tmp_path / 'empty.jsonl'}", f"A={tmp_path / 'none'}", "A"):
        assert run(main, "report", [*evaluation, word]) == 1
        line = capsys.readouterr().err
        assert "--report.credit" in line and line.count("\n") == 1


MEASURE = """<script>
const shown = [...document.querySelectorAll('.token')].map(one => {
  const box = one.getClientRects()[0];
  return [box.left, box.top, box.width, box.height, getComputedStyle(one).backgroundColor];
});
document.title = JSON.stringify({errors: window.errors, shown, title: document.title,
  width: document.documentElement.scrollWidth, visible: document.documentElement.clientWidth,
  cards: [...document.querySelectorAll('.answer')].map(one => one.getBoundingClientRect().toJSON())});
</script>"""
CATCH = "<script>window.errors = []; window.onerror = (message) => { window.errors.push(message); };</script>"


def browse(*words):
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--window-size=1280,4000",
            *words,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(not CHROMIUM, reason="no chromium here (Debian: apt-get install chromium)")
def test_a_browser_shows_the_colours_side_by_side_and_nothing_overflows(page, tmp_path):
    from PIL import Image

    text = page.read_text()
    measured = page.with_name("measured.html")
    measured.write_text(text.replace("<head>", f"<head>{CATCH}", 1).replace("</body>", f"{MEASURE}</body>"))
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = browse(profile, "--dump-dom", measured.as_uri())
    [title] = re.findall(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    found = json.loads(title.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert found["errors"] == [] and found["title"] == "Evaluation report", "no script of the data ran"
    assert found["width"] <= found["visible"] == 1280
    first, second = found["cards"]
    assert first["top"] == second["top"] and first["right"] < second["left"] and second["right"] <= 1280
    assert len(found["shown"]) == 2 * (5 + 10)

    picture = tmp_path / "page.png"
    assert browse(profile, f"--screenshot={picture}", page.as_uri()).returncode == 0
    image = Image.open(picture).convert("RGB")
    colours = set()
    for left, top, width, height, colour in found["shown"]:
        wanted = tuple(map(int, re.findall(r"\d+", colour)[:3]))
        # The corner of a token, where no letter is.
        seen = image.getpixel((round(left + min(width, 8) - 3), round(top + height) - 2))
        assert all(abs(one - other) <= 6 for one, other in zip(seen, wanted)), (left, top, seen, wanted)
        colours.add(wanted)
    assert len(colours) >= 8
