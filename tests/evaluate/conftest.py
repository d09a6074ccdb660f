"""A quickstart that others start from."""

from itertools import islice

import pytest
from tiny import flags, make_model, make_tokenizer, run_in_process, write_jsonl

from recipes.word_problems.problems import generate_problems


@pytest.fixture
def finished_quickstart(tmp_path):
    """What the script needs of a quickstart, with a tiny model for its own and answers made from the worked ones."""
    make_model(0, initializer_range=0.05).save_pretrained(tmp_path / "own_right")
    make_tokenizer().save_pretrained(tmp_path / "own_right")
    problems = list(islice(generate_problems("sample", 0, 2), 24))
    (tmp_path / "problems").mkdir()
    rows = [
        {"problem_id": str(number), "question": one.question, "steps": list(one.steps), "answer": str(one.answer)}
        for number, one in enumerate(problems)
    ]
    test_file = write_jsonl(tmp_path / "problems" / "test.jsonl", rows[:4])
    answers = []
    for row in rows:
        for label in (True, False):
            steps = row["steps"] if label else [*row["steps"][:-1], row["steps"][-1] + "0"]
            labels = [True] * (len(steps) - 1) + [label]
            answers.append(
                {"problem_id": row["problem_id"], "prompt": row["question"], "completions": steps, "labels": labels}
            )
    write_jsonl(tmp_path / "answers.jsonl", answers)
    evaluation = {
        "model.model_name_or_path": tmp_path / "own_right",
        "problems.file": test_file,
        "evaluate.output_dir": tmp_path / "evaluate_own_right",
        "data.input_template": "{}\n",
        "ds.param_dtype": "fp32",
        "evaluate.max_new_tokens": 40,
    }
    assert run_in_process("evaluate", *flags(evaluation)) == 0
    (tmp_path / "done").mkdir()
    for name in ("label_steps", "own_right", "evaluate_own_right"):
        (tmp_path / "done" / name).write_text(f"# {name}: 0 s\n")
    return tmp_path
