"""What may run code, open files or unpickle: the rules of docs/reliability.md, by reading the source and by trying."""

import ast
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import CHAT_TEMPLATE, make_tokenizer, save_adapter, train, write_jsonl
from transformers import dynamic_module_utils

from pipa_openrlhf.config import DataConfig, RunConfig
from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.loading import load_causal_lm, load_tokenizer

PACKAGE = Path(__file__).resolve().parent.parent / "pipa_openrlhf"
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NETWORK = {"requests", "urllib", "http", "httpx", "aiohttp", "ftplib", "smtplib", "socketserver", "openai"}
# The only file that asks an endpoint: that of --judge.base_url.
ASKS = "annotate/endpoint.py"
# The only files that run a Python file which is named by a flag: --pipa.objective_module and --data.layout_module.
RUN_FILES = {"objectives/table.py", "data/layouts/__init__.py"}
# What runs code that a model wrote. It is started in the sandbox of --sbs.execute_code.
INSIDE = "generate/inside_sandbox.py"


def breaches(source: str, name: str = "x.py") -> list[str]:
    """What a source does that the rules forbid, with its line."""
    return [f"{name}:{node.lineno}: {what}" for node in ast.walk(ast.parse(source)) for what in _breaches(node, name)]


def _breaches(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        allowed = {"openai"} if name == ASKS else set()
        forbidden = (UNPICKLERS | NETWORK) - allowed
        yield from (f"import {one.name}" for one in node.names if one.name.split(".")[0] in forbidden)
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        imported = {one.name for one in node.names}
        if str(node.module).split(".")[0] in UNPICKLERS | NETWORK and imported != {"UnpicklingError"}:
            yield f"from {node.module} import"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = [*node.args.posonlyargs, *node.args.args]
        defaults = [*zip(arguments[::-1], node.args.defaults[::-1]), *zip(node.args.kwonlyargs, node.args.kw_defaults)]
        yield from (
            "trusts by default" for one, value in defaults if one.arg == "trust_remote_code" and _is(value, True)
        )
    if isinstance(node, ast.Call):
        yield from _breaches_of_call(node, name)


def _breaches_of_call(node: ast.Call, name: str) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = {one.arg: one.value for one in node.keywords}
    if called in ("eval", "exec", "compile") and name != INSIDE:
        yield called
    if called in ("__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"):
        yield called
    if called.endswith("exec_module") and name not in RUN_FILES:
        yield called
    if called == "torch.load" and not _is(given.get("weights_only"), True):
        yield "torch.load without weights_only"
    if called == "torch.save":
        yield "torch.save writes a pickle"
    for option in ("trust_remote_code", "allow_pickle", "shell"):
        if _is(given.get(option), True):
            yield f"{option} is on"
    if _is(given.get("weights_only"), False):
        yield "weights_only is off"


def _is(value: ast.expr | None, constant: bool) -> bool:
    return isinstance(value, ast.Constant) and value.value is constant


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "import dill as d", "from pickle import loads, UnpicklingError", "eval('1')", "exec(text)"),
        *("torch.load(path)", "torch.load(path, weights_only=False)", "torch.save(x, path)", "import requests"),
        *("f(trust_remote_code=True)", "def f(trust_remote_code=True): 0", "np.load(path, allow_pickle=True)"),
        *("def f(*, trust_remote_code: bool = True): 0", "spec.loader.exec_module(module)", "yaml.load(text)"),
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_rules_see_a_breach(line):
    assert breaches(line)


def test_the_package_keeps_the_rules():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 80
    names = [path.relative_to(PACKAGE).as_posix() for path in files]
    assert [one for path, name in zip(files, names) for one in breaches(path.read_text(), name)] == []
    assert set(names) >= RUN_FILES | {INSIDE, ASKS}


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_weights_that_hold_code_are_refused(tiny_models, tmp_path):
    mark = tmp_path / "mark"
    model = tmp_path / "model"
    shutil.copytree(tiny_models / "policy", model)
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(mark)}, model / "pytorch_model.bin")
    adapter = tmp_path / "adapter"
    save_adapter(tiny_models / "policy", adapter, seed=0)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"lora_A": Evil(mark)}, adapter / "adapter_model.bin")
    for folder in (model, adapter):
        with pytest.raises(UserError, match="cannot load"):
            load_causal_lm(str(folder), torch.float32, "sdpa")
    assert not mark.exists()
    torch.load(model / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "so there was something to refuse"


def test_code_beside_a_model_runs_only_where_that_is_asked_for(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(tiny_models / "policy", model)
    (model / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot load a model"):
        load_causal_lm(str(model), torch.float32, "sdpa")
    load_tokenizer(str(model))
    assert not mark.exists()
    with suppress(Exception):  # it is no real model
        load_causal_lm(str(model), torch.float32, "sdpa", trust_remote_code=True)
    assert mark.exists(), "so there was something to refuse"


def test_a_run_writes_no_pickle(small_run, tmp_path):
    train("train_pipa", *small_run("out", **{"data.cache_dir": tmp_path / "data"}))
    written = [path for name in ("out", "cache", "data") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in written} >= {".safetensors", ".json", ".jsonl"}
    for path in written:
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"), path
        begin = path.read_bytes()[:4]
        assert not begin.startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")), path


opened: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if opened is not None and event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename"):
        opened.append(str(arguments[0]))


def test_a_chat_template_reaches_no_code(tmp_path):
    """It is run in transformers' sandbox, which has no attributes that lead out of it."""
    mark = tmp_path / "mark"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ cycler.__init__.__globals__.os.mkdir('" + str(mark) + "') }}" + CHAT_TEMPLATE
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "1", "completion": "2", "label": True}])
    config = RunConfig(data=DataConfig(apply_chat_template=True))
    with pytest.raises(UserError, match="chat template"):
        load_samples(config, tokenizer, dataset=path)
    assert not mark.exists()


def test_paths_in_data_never_reach_the_file_system(tmp_path):
    global opened
    sys.addaudithook(_watch)  # cannot be taken off again: it does nothing while nobody listens
    secret = tmp_path / "secret_of_the_data"
    secret.write_text("{}")
    texts = ("prompt", "completion", "problem_id", "system", "path", "image", "file", "data_dir", "config_name")
    row = {**dict.fromkeys(texts, str(secret)), "label": 1, "history": [[str(secret), f"file://{secret}"]]}
    path = write_jsonl(tmp_path / "data.jsonl", [row, {**row, "completion": f"{secret}/../x"}])
    opened = []
    try:
        loaded = load_samples(RunConfig(data=DataConfig(max_len=10_000)), make_tokenizer(), dataset=path)
        seen = opened
    finally:
        opened = None
    assert len(loaded.samples) == 2 and path in seen
    assert [one for one in seen if "secret_of_the_data" in one] == []
