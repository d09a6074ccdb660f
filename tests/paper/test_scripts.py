"""scripts/paper: a script for every published row, the flags of each, a dry run of all, and some at toy size."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_model, make_tokenizer, read_jsonl, run_in_process, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "scripts" / "paper"
sys.path.insert(0, str(PAPER))

import plan  # noqa: E402
import tables  # noqa: E402

METHOD = ROOT.parent / "shared" / "METHOD.md"
# By hand, from the paper: what the flags of a method are, and its learning rates (DeepSeek, Qwen).
METHODS = {
    "DPO": ("train_dpo", {"model.beta": "0.1"}, ("5e-7", "5e-7")),
    "IPO": ("train_dpo", {"model.beta": "0.1", "model.ipo_enable": None}, ("5e-7", "5e-7")),
    "Step-DPO": ("train_dpo", {"model.beta": "0.1", "dpo.step_loss": "l1"}, ("5e-7", "5e-7")),
    "KTO": ("train_kto", {"model.beta": "0.1"}, ("5e-5", "5e-7")),
    "Step-KTO": ("train_kto", {"model.beta": "0.1", "kto.step_loss": "l1"}, ("5e-5", "5e-7")),
    "PIPA-M": ("train_pipa", {"pipa.variant": "m"}, ("5e-5", "5e-7")),
    "PIPA-N": ("train_pipa", {"pipa.variant": "n"}, ("5e-5", "5e-7")),
}
RECIPE = {"ds.lora.rank": "64", "ds.lora.alpha": "16", "train.batch_size": "256", "train.max_epochs": "1"}


def run(script, *words, timeout=60) -> subprocess.CompletedProcess:
    command = ["bash", str(PAPER / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def commands(script, *words) -> list[tuple[str, list[str]]]:
    """(module, words) of the commands that a script would run."""
    done = run(script, "--commands_only", *words)
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]
    places = [next(n for n, word in enumerate(line) if word.startswith(plan.PREFIX)) for line in lines]
    return [(line[n].removeprefix(plan.PREFIX), line[n + 1 :]) for line, n in zip(lines, places)]


def as_flags(words: list[str]) -> dict[str, str | None]:
    """Flag to value, None where it has none; the last one wins."""
    found = {}
    for index, word in enumerate(words):
        if word.startswith("--"):
            following = words[index + 1] if index + 1 < len(words) else "--"
            found[word[2:]] = None if following.startswith("--") else following
    return found


@pytest.mark.skipif(not METHOD.exists(), reason="the table to compare with is not beside this checkout")
def test_the_published_numbers_are_those_of_the_method_page():
    section = METHOD.read_text().split("## Results to reproduce", 1)[1].split("\n## ", 1)[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    rows, data, labels = [], "", ""
    for line in lines[2:]:
        data, labels = line[0] or data, line[1] or labels
        rows.append([f"{data}, {labels}: {line[2]}", *line[3:]])
    of_page = [[row["algorithm"], *(row[column] for column in tables.COLUMNS)] for row in tables.published()]
    assert len(rows) == 15 and of_page[:15] == rows


def test_every_published_row_has_a_script_and_every_script_of_a_table_a_row():
    runs = {row["run"] for row in tables.published()}
    scripts = {path.stem for path in PAPER.glob("*/*.sh")}
    assert scripts - runs == {"figure5_pipa_m", "figure5_pipa_n"} and runs <= scripts
    assert all(len(path.read_text().splitlines()) <= 9 for path in PAPER.glob("*/*.sh"))


@pytest.mark.parametrize("model", [0, 1], ids=tables.MODELS)
def test_rows_of_table_1_train_what_their_line_says(model):
    for row in [row for row in tables.published() if row["table"] == "1"]:
        data, labels, method = re.fullmatch(r"(\w+), (\w+): (\S+)", row["algorithm"]).groups()
        found = commands(f"table1/{row['run']}.sh", "--model", tables.MODELS[model])
        assert [one for one, _ in found][:2] == ["prepare_alphamath", "train_sft"]
        [(module, words)] = [one for one in found if one[0] not in ("prepare_alphamath", "train_sft", "evaluate")]
        given = as_flags(words)
        expected, own, rates = METHODS[method]
        assert module == expected and given["data.annotation"] == labels and given["adam.lr"] == rates[model]
        assert given.get("data.pairing") == ("match" if data == "paired" else None)
        assert own.items() <= given.items() and RECIPE.items() <= given.items()
        specific = {name for name in given if name.split(".")[0] in ("pipa", "kto", "dpo")} | {"model.ipo_enable"}
        assert specific & set(given) <= set(own)
        folder = f"runs/paper/{tables.MODELS[model]}/{row['run']}"
        assert given["ckpt.output_dir"] == folder
        evaluated = [as_flags(words) for one, words in found if one == "evaluate"]
        assert [one["evaluate.output_dir"] for one in evaluated] == [f"{folder}_gsm8k", f"{folder}_math"]
        assert all(one["model.model_name_or_path"] == folder for one in evaluated)
        assert [(one["evaluate.decode"], one["sbs.beams"], one["sbs.samples"]) for one in evaluated] == [
            ("sbs", "3", "1"),
            ("sbs", "1", "1"),
        ]


def test_ablations_and_the_grid_change_one_thing():
    def trained(script, *words):
        return as_flags([one for one in commands(script, *words) if one[0] not in ("evaluate",)][-1][1])

    def changed(script, base, *words):
        ours, theirs = trained(script, *words), trained(f"table1/{base}.sh")
        names = (ours.keys() | theirs.keys()) - {"ckpt.output_dir"}
        return {name: ours.get(name) for name in names if ours.get(name) != theirs.get(name)}

    m, n, folder = "unpaired_step_pipa_m", "unpaired_step_pipa_n", "runs/paper/deepseek"
    assert changed("ablations/table2_fixed_g.sh", m) == {"pipa.fixed_value": "0.5"}
    for variant, base, keep in (("m", m, "all"), ("n", n, "negative")):
        script = f"ablations/table3_pipa_{variant}_trained_prior.sh"
        assert changed(script, base) == {"prior.model_name_or_path": f"{folder}/prior_{keep}"}
        [prior] = [as_flags(words) for _, words in commands(script) if f"{folder}/prior_{keep}" == words[-1]]
        assert (prior["data.keep"], prior["train.max_epochs"]) == (keep, "3")
        assert prior["model.model_name_or_path"] == f"{folder}/sft"
    assert changed("ablations/table4_kto_sft.sh", "unpaired_answer_kto") == {"kto.sft_coef": "1.0"}
    assert changed("ablations/table4_pipa_m_sft.sh", "paired_answer_pipa_m") == {"pipa.sft_coef": "1.0"}
    assert changed(f"table1/{m}.sh", m, "--lr", "5e-6") == {"adam.lr": "5e-6"}
    swept = [words for module, words in commands("ablations/figure5_pipa_n.sh") if module == "train_pipa"]
    assert [next(word for word in words if "threshold=" in word).split("=")[1] for words in swept] == [
        *("-0.5", "0", "0.25", "0.75", "1")
    ]
    assert len({as_flags(words)["ckpt.output_dir"] for words in swept}) == 5


def test_a_dry_run_of_everything_checks_and_estimates_it(monkeypatch):
    monkeypatch.setattr(plan, "flops_a_token", lambda model: {"step": 3e10, "forward": 1e10})
    monkeypatch.setattr(plan, "step_memory", lambda model, sequences, gpus: sequences + gpus)
    lines = commands_of_runner("run_table1.sh") + commands_of_runner("run_ablations.sh")
    output = list(plan.report(lines, plan.Machine(gpus=8, tflops=989, utilisation=0.35)))
    remarks = [line for line in output if line.startswith("    #")]
    # 215 MB x 0.85 / 3 is 60.9 M tokens; KTO on all of them, first of its model to: a step, a second forward pass and
    # two of the prior, 6e10 FLOPs a token, at 0.35 x 989 TFLOP/s.
    place = next(index for index, line in enumerate(output) if line.endswith("deepseek/unpaired_answer_kto"))
    assert output[place + 1] == "    # 61 M tokens, about 16 GiB a GPU, 2.9 GPU-hours"
    # Data; SFT of both; 2 x 15 rows; Tables 2 to 4, two priors, 2 x 5 thresholds. All but the priors evaluated twice.
    trained = 2 + 2 * 15 + 5 + 2 + 10
    assert output[-1].startswith(f"{1 + trained + 2 * (trained - 2)} commands")
    assert len(remarks) == 1 + trained + 2 * (trained - 2) and not any("no estimate" in line for line in remarks)


def test_counts_of_a_model_of_7b_are_near_those_by_hand():
    """6.9 G parameters: a forward pass takes 2 FLOPs of each a token; a LoRA step that recomputes, three passes."""
    counted = plan.flops_a_token("DeepSeek-Math-7B")
    assert 2 * 6.5e9 < counted["forward"] < 2 * 8e9 and 2.9 < counted["step"] / counted["forward"] < 3.4
    alone, shared = (plan.step_memory("DeepSeek-Math-7B", 1, gpus) for gpus in (1, 8))
    # Bf16 weights take 13.2 GiB; the masters and moments of 0.17 G parameters in adapters and head 1.9 GiB.
    assert 13.2 + 1.9 < alone < 18 and alone - shared == pytest.approx(1.86 * 7 / 8, abs=0.05)


def test_the_grid_adds_the_two_rates_that_a_row_does_not_have():
    lines = set(commands_of_runner("run_lr_grid.sh"))
    more = lines - set(commands_of_runner("run_table1.sh"))
    assert len(more) == 2 * 15 * 2 * 3 and len(lines) == 1 + 2 * 3 + 2 * 15 * 3 * 3
    trained = [as_flags(shlex.split(line)) for line in more if "cli.train_" in line]
    assert all(one["ckpt.output_dir"].endswith(f"_lr{one['adam.lr']}") for one in trained)


def commands_of_runner(script) -> list[str]:
    done = run(script, "--commands_only")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_verifiable_loop_samples_alike_for_both_arms_and_its_cost_is_estimated(monkeypatch):
    monkeypatch.setattr(plan, "flops_a_token", lambda model: {"step": 3e10, "forward": 1e10})
    monkeypatch.setattr(plan, "step_memory", lambda model, sequences, gpus: sequences + gpus)
    lines = [shlex.split(line) for line in commands_of_runner("verifiable.sh")]
    drawn = [as_flags(words) for words in lines if "pipa_openrlhf.cli.sample" in words]
    folder = "runs/paper/deepseek"
    models = [
        folder + "/sft",
        *(f"{folder}/verifiable_{arm}_{number}" for number in (1, 2) for arm in ("dpo", "pipa")),
    ]
    # The first answers, of the common start, are drawn by one command, which both arms name.
    assert [one["model.model_name_or_path"] for one in drawn] == [models[0], *models]
    assert drawn[0] == drawn[1]
    own = {"model.model_name_or_path", "sample.output"}
    assert len({tuple(sorted((name, one[name]) for name in one.keys() - own)) for one in drawn}) == 1

    output = list(plan.report(map(shlex.join, lines), plan.Machine(gpus=8, tflops=989, utilisation=0.35)))
    remark = {line: output[place + 1] for place, line in enumerate(output[:-1])}
    # 59784 answers in batches of 96: 623 x 1024 x 0.04 s. They have 350 tokens each; half of 7473 problems have pairs.
    [sampling] = [line for line in remark if line.endswith("sampled_verifiable_1.jsonl")]
    assert remark[sampling] == "    # 59784 answers on one GPU, about 7.1 hours"
    [pairs] = [line for line in remark if line.endswith("pairs_1.jsonl")]
    assert remark[pairs] == "    # about 3736 pairs"
    trained = [line for line in remark if line.endswith(("verifiable_dpo_1", "verifiable_pipa_1"))]
    # 2.6 M and 20.9 M tokens; a step and the prior's pass take 4e10 FLOPs a token.
    assert [remark[line].split(", ")[::2] for line in trained] == [
        ["    # 3 M tokens", "0.1 GPU-hours"],
        ["    # 21 M tokens", "0.7 GPU-hours"],
    ]
    with pytest.raises(plan.UserError, match="no command before makes it"):
        list(plan.report([pairs], plan.Machine(8, 989, 0.35)))


@pytest.fixture
def toy(tmp_path):
    """Model, eight right and eight wrong answers, and problems."""
    make_model(0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = []
    for number in range(16):
        result, q = (number // 4 + 1, 1) if number % 2 else (number + 10, -1)
        steps = [{"step": f"think {number}", "Q": 0.6}, {"step": f"Final Answer: ${result}$", "Q": q}]
        rows.append({"instruction": f"<question> {number // 4}+1? </question>", "output": steps})
    (tmp_path / "alphamath.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(3)])
    write_jsonl(tmp_path / "math.jsonl", [{"problem": f"{n}+1?", "solution": f"\\boxed{{{n + 1}}}"} for n in range(3)])
    return tmp_path


def test_the_commands_run_at_toy_size_to_the_filled_table(toy, capfd):
    """The scripts' own commands, all but one in this process, which has torch already."""
    words = ("--toy", toy, "--work", toy / "work")
    work = toy / "work" / "toy"
    done = work / "deepseek" / "done"
    done.mkdir(parents=True)
    rows = ("paired_step_dpo", "unpaired_answer_kto", "unpaired_step_pipa_n")
    for name in ("sft", *(row["run"] for row in tables.published())):
        for stage in (name, f"{name}_gsm8k", f"{name}_math"):
            (done / stage).touch()
    first = run("run_table1.sh", "--model", "deepseek", *words)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("== prepare\n") == 1 and first.stdout.count("done before") == 3 + 15 * 5
    assert "| paired, answer: DPO | 68.39 / - | 67.17 / - | 46.94 / - | 47.78 / - |" in first.stdout
    for name in ("sft", *rows):
        for stage in (name, f"{name}_gsm8k", f"{name}_math"):
            (done / stage).unlink()
    seen = []
    for script in ("sft.sh", *(f"table1/{name}.sh" for name in rows)):
        for command in commands(script, *words):
            if command not in seen:
                seen.append(command)
                assert run_in_process(command[0], *command[1]) == 0, command
    for name, steps in (("paired_step_dpo", 2), ("unpaired_answer_kto", 2), ("unpaired_step_pipa_n", 2)):
        assert len(read_jsonl(work / "deepseek" / name / "metrics.jsonl")) == steps
    page = tables.pages(work)["table1.md"]
    [line] = [line for line in page.splitlines() if line.startswith("| unpaired, step: PIPA-N |")]
    assert re.fullmatch(r"\| unpaired, step: PIPA-N \| 79.98 / \d+\.\d\d \(.* to .*, 2 problems\) \|.*", line)
    [untouched] = [line for line in page.splitlines() if line.startswith("| paired, answer: DPO |")]
    assert untouched.count(" / -") == 4


RAY = "python -m pipa_openrlhf.cli.launch_ray --ray.num_workers 2 --ray.address local --"


@pytest.mark.slow
def test_training_runs_as_a_ray_job_where_the_launcher_says_so(toy, monkeypatch):
    """About 50 seconds, most of it the cluster's start; one of its own, whatever else runs on this machine."""
    monkeypatch.setenv("LAUNCH", RAY)
    done = run("sft.sh", "--toy", toy, "--work", toy / "work", timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    command = (toy / "work" / "toy" / "deepseek" / "done" / "sft").read_text()
    assert f"{RAY} pipa_openrlhf.cli.train_sft" in command
    assert len(read_jsonl(toy / "work" / "toy" / "deepseek" / "sft" / "metrics.jsonl")) == 2


def test_a_dry_run_looks_behind_the_launcher(monkeypatch):
    def estimates() -> list[str]:
        return [line for line in run("sft.sh", "--dry_run").stdout.splitlines() if "GPU-hours" in line]

    with_deepspeed = estimates()
    monkeypatch.setenv("LAUNCH", RAY)
    assert estimates() == with_deepspeed != []


@pytest.mark.parametrize(
    "words, message",
    [
        (("--modle", "qwen"), "error: unknown argument --modle (use --model, --work, --lr, --dry_run or --toy)\n"),
        (("--model", "llama"), "error: --model llama is not deepseek or qwen\n"),
    ],
)
def test_a_mistake_is_one_line(words, message):
    done = run("sft.sh", *words)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)


def test_a_plan_refuses_what_cannot_work():
    machine = plan.Machine(8, 989, 0.35)
    row = [shlex.join(["python", "-m", plan.PREFIX + module, *words]) for module, words in commands("sft.sh")]
    with pytest.raises(plan.UserError, match="no command before makes it"):
        list(plan.report(row[1:], machine))
    with pytest.raises(plan.UserError, match="--adam.rate"):
        list(plan.report([row[0], f"{row[1]} --adam.rate 1"], machine))
    with pytest.raises(plan.UserError, match="--model.model_name_or_path runs/paper/deepseek/sft: no such folder"):
        list(plan.report([row[0], row[2]], machine))
