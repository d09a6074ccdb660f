"""A second run into a finished folder with any one deciding flag changed is refused by that flag's name."""

import json

import pytest
import torch
from tiny import flags, run_in_process, write_jsonl

from pipa_openrlhf.cli.flags import TRAINING_MODULES, build_parser, new_config
from pipa_openrlhf.model.policy import ValueHead, save_value_head
from pipa_openrlhf.settings import MAY_CHANGE as FREELY
from pipa_openrlhf.settings import settings_of

# Every public layout at once, so that one data set changes with each of the data flags.
ROWS = [
    {
        "prompt": f"{n}+{n}?\n",
        "question": f"what is {n}+{n}?\n",
        "chosen": f"it is {n + n}",
        "rejected": f"no {n}",
        "better": "x" * (n + 1),
        "worse": "y" * (n + 2),
        "completions": ["x" * (n % 4 + 1), f"so {n + n + n % 3}"],
        "labels": [n % 4 > 0, n % 3 == 0],
        "completion": f"{n + n % 2}",
        "label": n % 2,
        "other_label": 1 - n % 2,
        "text": f"answer {n}",
        "instruction": f"<question>{n}</question>",
        "output": [
            {"step": f"<step>\n{n}<output>4</output></step>", "Q": 0.3},
            {"step": "<p>done</p>", "Q": 1 if n % 2 else -1},
        ],
    }
    for n in range(6)
]
STEPWISE = {"data.format": "stepwise"}
ALPHAMATH = {"data.format": "alphamath", "data.annotation": "step"}
UNPAIRED = {"data.format": "unpaired"}
SIGNED = {"data.dataset": "{signed}", "data.annotation": "step", **STEPWISE}
AUTO = {"data.format": "auto"}
KTO_COLUMNS = {"data.input_key": "prompt", "data.output_key": "text", **UNPAIRED}

# Another value of every flag that decides; where needed, with what the finished run has in common.
OTHER: dict[str, tuple[object, dict]] = {
    "model.model_name_or_path": ("{prior}", {}),
    "prior.model_name_or_path": ("{policy}", {}),
    "ref.model_name_or_path": ("{prior}", {"prior.model_name_or_path": None}),
    "value.init_from": ("{head}", {}),
    "pipa.objective_module": ("{objective}", {}),
    "model.beta": (0.2, {}),
    "model.ipo_enable": (True, {}),
    "model.label_smoothing": (0.1, {}),
    "model.aux_loss_coef": (0.1, {}),
    "model.nll_loss_coef": (0.1, {}),
    "model.keep_dropout": (True, {}),
    "ds.param_dtype": ("bf16", {}),
    "ds.grad_accum_dtype": ("fp32", {}),
    "ds.lora.rank": (2, {}),
    "ds.lora.alpha": (8, {}),
    "ds.lora.target_modules": (["q_proj"], {}),
    "ds.lora.dropout": (0.1, {}),
    "optim": ("muon", {}),
    "muon.lr": (0.1, {}),
    "muon.momentum": (0.9, {}),
    "muon.ns_steps": (4, {}),
    "muon.nesterov": (True, {}),
    "adam.lr": (0.001, {}),
    "adam.betas": ([0.8, 0.95], {}),
    "adam.eps": (1e-6, {}),
    "adam.weight_decay": (0.1, {}),
    "lr_scheduler": ("linear", {}),
    "lr_warmup_ratio": (0.5, {}),
    "min_lr_ratio": (0.5, {}),
    "max_norm": (2.0, {}),
    "train.seed": (7, {}),
    "train.batch_size": (5, {}),
    "train.group_by_length": ("false", {"train.group_by_length": "true"}),
    "ckpt.merge_lora": (True, {}),
    "ckpt.value_model": (True, {}),
    "pipa.variant": ("n", {}),
    "pipa.loss_reduction": ("token_mean", {}),
    "pipa.clip_eps": (1e-6, {}),
    "pipa.fixed_value": (0.5, {}),
    "pipa.sft_coef": (1.0, {}),
    "pipa.beta": (0.5, {}),
    "value.hidden_size": (8, {}),
    "value.lr": (0.1, {}),
    "dpo.step_loss": ("l0", {}),
    "kto.step_loss": ("per_step", {}),
    "kto.desirable_weight": (2.0, {}),
    "kto.undesirable_weight": (2.0, {}),
    "kto.sft_coef": (1.0, {}),
    "data.dataset": ("{other_data}", {}),
    "data.dataset_probs": ("0.5,0.5", {"data.dataset": "{data},{other_data}", "data.dataset_probs": "0.9,0.1"}),
    "data.dataset_split": ("test", {"data.dataset": "{splits}", "data.dataset_split": "train"}),
    "data.max_samples": (5, {}),
    "data.max_len": (12, {}),
    "data.prompt_key": ("question", {}),
    "data.chosen_key": ("better", {}),
    "data.rejected_key": ("worse", {}),
    "data.format": ("stepwise", {"data.format": "paired", "data.pairing": None}),
    "data.annotation": ("step", STEPWISE),
    "data.pairing": ("match", {**UNPAIRED, "data.prompt_key": "same", "data.pairing": None}),
    "data.prefixes": ("true", {**STEPWISE, "data.annotation": "step"}),
    "data.neutral_step": ("positive", SIGNED),
    "data.after_first_error": ("mask", {"data.dataset": "{first_error}", "data.annotation": "step", **AUTO}),
    "data.placeholder_token": (
        "<b>",
        {"data.dataset": "{tagged}", "data.placeholder_token": "<a>", "data.annotation": "step", **AUTO},
    ),
    "data.whole_answers": (True, {"data.dataset": "{step_dpo}", **AUTO}),
    "data.layout_module": ("{layout}", {"data.format": "auto", "data.dataset": "{plain}"}),
    "data.step_threshold": (0.1, ALPHAMATH),
    "data.step_separator": ("; ", STEPWISE),
    "data.mask_tool_output": ("false", ALPHAMATH),
    "data.input_template": ("Q: {}", {}),
    "data.apply_chat_template": (True, {}),
    "data.tokenizer_chat_template": ("{template}", {"data.apply_chat_template": True}),
    "data.special_tokens": ("prompt", {**UNPAIRED, "data.dataset": "{rendered}"}),
    "data.keep": ("all", UNPAIRED),
    "data.input_key": ("question", KTO_COLUMNS),
    "data.output_key": ("better", KTO_COLUMNS),
    "data.label_key": ("other_label", KTO_COLUMNS),
}
# Refused for other reasons on a machine without CUDA, or without effect on a tokenizer that has only one form.
NOT_HERE = {"ds.load_in_4bit", "data.disable_fast_tokenizer"}
# Another value of every flag that may change.
FREE = {
    "train.max_bad_steps": 3,
    "train.max_epochs": 1,
    "ckpt.output_dir": None,
    "ckpt.path": "{root}/elsewhere",
    "ckpt.save_steps": 7,
    "ckpt.save_hf": True,
    "ckpt.disable_ds": True,
    "ckpt.max_num": 9,
    "ckpt.max_mem": 5,
    "ckpt.load_enable": True,
    "ckpt.overwrite": None,
    "prior.cache_dir": "{root}/other_cache",
    "use_ms": None,
    "model.self_check": "false",
    "model.trust_remote_code": True,
    "logger.logging_steps": 3,
    "logger.tensorboard_dir": "{root}/tensorboard",
    "logger.wandb.key": "secret",
    "logger.wandb.org": "org",
    "logger.wandb.group": "group",
    "logger.wandb.project": "project",
    "logger.wandb.run_name": "name",
    "eval.dataset": "{other_data}",
    "eval.split": "train",
    "eval.steps": 2,
    "train.micro_batch_size": 1,
    "train.max_tokens_per_micro_batch": 30,
    "train.fused_head": "false",
    "train.share_prefixes": "false",
    "train.full_determinism_enable": None,
    "data.dataloader_num_workers": 1,
    "data.allow_empty_prompt": True,
    "data.num_proc": 2,
    "data.streaming": True,
    "data.cache_dir": "{root}/other_data_cache",
    "data.on_error": "skip",
    "data.max_error_share": 0.5,
    "model.gradient_checkpointing_enable": True,
    "model.gradient_checkpointing_reentrant": True,
    "ref.offload": True,
    "local_rank": 0,
    "ds.attn_implementation": "eager",
    "ds.experts_implementation": "eager",
    "ds.zero_stage": 3,
    "ds.use_universal_ckpt": True,
    "ds.deepcompile": True,
    "ds.zpg": 2,
    "ds.adam_offload": True,
    "ds.use_liger_kernel": None,
    "ds.overlap_comm": True,
    "ds.tensor_parallel_size": None,
    "ds.ring_attn_size": None,
    "ds.ring_attn_head_stride": 2,
    "ds.packing_samples": True,
}


MAY_CHANGE = {
    one.name for module in TRAINING_MODULES for one in settings_of(new_config(module)) if one.spec.role == FREELY
}
NOT_SETTINGS = ("help", "config", "objective")


def names_of(module: str) -> list[str]:
    names = dict.fromkeys(one.dest for one in build_parser(module)._actions)
    return [name for name in names if name not in NOT_SETTINGS]


def deciding() -> list[tuple[str, str]]:
    """Module and flag; what decides through the data alone is tried in the first module that has it."""
    found, seen = [], set()
    for module in TRAINING_MODULES:
        for name in names_of(module):
            of_no_use = module == "train_sft" and name == "ref.model_name_or_path"
            if name not in MAY_CHANGE | NOT_HERE | seen and not of_no_use:
                found.append((module, name))
                seen |= {name} if name.startswith("data.") else set()
    return found


DECIDING = deciding()


@pytest.fixture(scope="module")
def files(tiny_models, tmp_path_factory):
    """Paths that the flags above name."""
    root = tmp_path_factory.mktemp("files")
    rows = [{**row, "same": f"one of {n // 2}: "} for n, row in enumerate(ROWS)]
    paths = {name: str(tiny_models / name) for name in ("policy", "prior")}
    paths["data"] = write_jsonl(root / "data.jsonl", rows)
    paths["other_data"] = write_jsonl(root / "other.jsonl", rows[::-1])
    paths["signed"] = write_jsonl(root / "signed.jsonl", [{**row, "labels": [0, -1]} for row in rows])
    plain = [{name: row[name] for name in ("prompt", "completion", "label")} for row in rows]
    paths["plain"] = write_jsonl(root / "plain.jsonl", plain)
    rendered = [{**row, "prompt": f"{row['prompt']}<|im_end|>"} for row in rows]
    paths["rendered"] = write_jsonl(root / "rendered.jsonl", rendered)
    steps = {"steps": ["a", "b", "c"], "final_answer_correct": False}
    first_error = [{"problem": row["prompt"], **steps, "label": n % 2} for n, row in enumerate(rows)]
    paths["first_error"] = write_jsonl(root / "first_error.jsonl", first_error)
    tagged = [{"input": f"{n}? Step 1: a<a>b<b>c<a>d<b>", "value": ["+", "-"]} for n in range(6)]
    paths["tagged"] = write_jsonl(root / "tagged.jsonl", tagged)
    step_dpo = {"initial_reason_steps": "Step 1: a\nStep 2:", "full_chosen": " b\nStep 3: c", "full_rejected": " d"}
    sides = {"chosen": " b", "rejected": " d", **step_dpo}
    paths["step_dpo"] = write_jsonl(root / "step_dpo.jsonl", [{"prompt": row["prompt"], **sides} for row in rows])
    (root / "layout.py").write_text(
        "from pipa_openrlhf.data.layouts.unpaired import fits, read as right_way_round\n"
        "def read(row, where, index, flags):\n"
        "    return right_way_round({**row, 'label': 1 - row['label']}, where, index, flags)\n"
    )
    paths["layout"] = str(root / "layout.py")
    (root / "splits").mkdir()
    for name, some in (("train", rows[:4]), ("test", rows[2:])):
        write_jsonl(root / "splits" / f"{name}.jsonl", some)
    paths["splits"] = str(root / "splits")
    torch.manual_seed(0)
    save_value_head(str(root), ValueHead(16, 8, torch.float32).state_dict())
    paths["head"] = str(root)
    (root / "objective.py").write_text(
        "from pipa_openrlhf.objectives.table import objectives\n"
        "def make_objective(config):\n    return objectives()['pipa_n']\n"
    )
    paths["objective"] = str(root / "objective.py")
    paths["template"] = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    paths["root"] = str(root)
    return paths


@pytest.fixture(scope="module")
def finished(files):
    """``finished(module, **changes)`` -> the flags of a finished run, made once for every set of changes."""
    made: dict[str, dict] = {}

    def make(module: str, **changes) -> dict:
        key = json.dumps([module, changes])
        if key not in made:
            made[key] = {
                "model.model_name_or_path": files["policy"],
                "prior.model_name_or_path": files["prior"] if module != "train_sft" else None,
                "prior.cache_dir": f"{files['root']}/cache" if module != "train_sft" else None,
                "data.dataset": files["data"],
                "data.format": "paired",
                "ds.param_dtype": "fp32",
                "ds.zero_stage": 0,
                "ds.lora.rank": 4,
                "train.batch_size": 6,
                "ckpt.output_dir": f"{files['root']}/run{len(made)}",
                **{name: filled(value, files) for name, value in changes.items()},
            }
            assert run_in_process(module, *flags(made[key])) == 0
        return made[key]

    return make


def filled(value, files):
    if not isinstance(value, str):
        return value
    for name in files:
        value = value.replace("{" + name + "}", files[name])
    return value


@pytest.mark.parametrize("module, name", DECIDING, ids=[f"{module}-{name}" for module, name in DECIDING])
def test_every_deciding_flag_is_refused_by_name(finished, files, capsys, module, name):
    assert name in OTHER, f"does --{name} decide the result? List it here, or give its field role=MAY_CHANGE"
    value, common = OTHER[name]
    known = vars(build_parser(module).parse_args([]))
    run = finished(module, **{flag: value for flag, value in common.items() if flag in known})
    folder = run["ckpt.output_dir"]
    capsys.readouterr()
    # The one switch whose flag has another name than its value.
    changed = {"muon.no_nesterov" if name == "muon.nesterov" else name: filled(value, files)}
    assert run_in_process(module, *flags({**run, **changed}), "--ckpt.load_enable") == 1
    output = capsys.readouterr()
    named = "prior.model_name_or_path" if name == "ref.model_name_or_path" else name
    (line,) = [line for line in output.err.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: {folder} holds a run with --{named} ")
    assert ", here " in line and "Train step" not in output.err


def test_what_may_change_is_flags_and_each_has_another_value_here():
    assert MAY_CHANGE == FREE.keys()
    assert MAY_CHANGE <= {name for module in TRAINING_MODULES for name in names_of(module)}


@pytest.mark.parametrize("module", TRAINING_MODULES)
def test_finished_run_is_recognised_whatever_may_change(finished, files, capsys, module):
    run = finished(module)
    known = names_of(module)
    changes = {name: filled(value, files) for name, value in FREE.items() if value is not None and name in known}
    capsys.readouterr()
    assert run_in_process(module, *flags({**run, **changes})) == 0
    output = capsys.readouterr()
    assert f"{run['ckpt.output_dir']} already holds this run, finished after" in output.out
    assert "Train step" not in output.err
