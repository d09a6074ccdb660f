"""The pages as a site: every link leads somewhere, every docstring can be read, and the five minutes are a run."""

import re
import subprocess
import sys
from pathlib import Path

from tiny import read_jsonl, run_in_process

ROOT = Path(__file__).parents[2]


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    built = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= built
    assert "pipa_n_token_loss" in (tmp_path / "site" / "api" / "index.html").read_text()


def test_the_five_minutes_are_a_run(tmp_path, tiny_models):
    page = (ROOT / "docs" / "unpaired.md").read_text()
    [rows] = re.findall(r"<<'ROWS'\n(.*?)ROWS\n", page, re.DOTALL)
    [flags] = re.findall(r"cli\.train_pipa (.*?)\n```", page, re.DOTALL)
    (tmp_path / "answers.jsonl").write_text(rows)
    words = flags.replace("\\\n", " ").split()
    told = {
        "MODEL": str(tiny_models / "policy"),
        "answers.jsonl": str(tmp_path / "answers.jsonl"),
        "runs/pipa": str(tmp_path / "run"),
    }
    words = [told.get(word, word) for word in words]
    assert run_in_process("train_pipa", *words, "--prior.cache_dir", str(tmp_path / "cache")) == 0
    [row] = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert row["right_token_share"] is not None and (tmp_path / "run" / "adapter_config.json").exists()
