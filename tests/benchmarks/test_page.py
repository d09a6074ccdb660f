"""Table, plot and the page that they are put into."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))

import page  # noqa: E402
from targets import Ratio  # noqa: E402

RATIOS = {
    ("words", "trl_kto", False): Ratio(12.0, 8.04, 7.0, 9.0),
    ("words", "trl_kto", True): Ratio(9.0, 6.0, 5.0, 7.0),
    ("trees", "pipa_prompts", False): Ratio(1.5, 1.4, 1.3, 1.6),
}


def test_the_table_has_what_was_measured_and_blanks_elsewhere():
    heading, rule, *rows = page.table(RATIOS).splitlines()
    assert "word problems: time | FLOPs" in heading and "search trees: time" in heading and "GSM8K" not in heading
    assert rule.count("---") == 7
    assert rows == [
        "| ours, prompts shared alone |  |  |  |  | 1.4 (1.3-1.6) | 1.50 |",
        "| TRL KTO | 8.0 (7.0-9.0) | 12.00 | 6.0 (5.0-7.0) | 9.00 |  |  |",
    ]


def test_the_sentence_names_others_times_the_largest_first():
    ratios = {**RATIOS, ("words", "trl_dpo", False): Ratio(1.0, 9.96, 1.0, 1.0)}
    ratios["words", "pipa_prompts", False] = Ratio(2.0, 2.0, 2.0, 2.0)
    assert page.sentence(ratios).endswith("whole trainers on all sides: TRL DPO 10.0, TRL KTO 8.0.")


def test_the_picture_is_svg_with_a_labelled_bar_for_every_arm():
    text = "".join(ElementTree.fromstring(page.picture(RATIOS)).itertext())
    assert "TRL KTO" in text and "PIPA (ours)" in text and "8.0" in text and "prompts shared" not in text
    assert page.picture(RATIOS) == page.picture(RATIOS), "the same figures give the same file"


def test_only_what_is_between_the_markers_changes(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text("before\n<!-- table: begin -->\nold\n<!-- table: end -->\nafter\n")
    page.write({"table": "new\n"}, "<svg/>", path)
    assert path.read_text() == "before\n<!-- table: begin -->\nnew\n<!-- table: end -->\nafter\n"
    assert path.with_suffix(".svg").read_text() == "<svg/>"


def test_a_page_without_its_markers_is_refused_and_not_changed(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text("no markers\n")
    with pytest.raises(ValueError, match="table: begin"):
        page.write({"table": "new"}, None, path)
    assert path.read_text() == "no markers\n"


@pytest.mark.parametrize("name", ["table", "targets", "checkpointing", "cost"])
def test_the_pages_have_the_markers(name):
    text = (page.README if name == "cost" else page.PAGE).read_text()
    assert page.between_markers(text, name, "new") != text
