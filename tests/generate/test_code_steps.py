"""Code in the steps of a searched answer: what is run, what is added, and what the model then knows.

The model is a real one whose next token is decided by a script, so that it writes code.
"""

import pytest
import torch
from test_sampling import make_model, make_tokenizer

from pipa_openrlhf.config import ModelSource
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.code_steps import CodeRunner, code_of
from pipa_openrlhf.generate.config import EvaluateConfig, EvaluateSettings, ProblemsConfig, PromptConfig, SbsSettings
from pipa_openrlhf.generate.sandbox import Execution, Sandbox
from pipa_openrlhf.generate.search import SearchSettings, search_batches
from pipa_openrlhf.generate.steps import StepSampler, StepSettings
from pipa_openrlhf.model.policy import ValueHead

PROMPT = "<question> 40 and 2? </question>\n"
FIRST = "<step>\n<p>\nTwo.\n</p>\n<code>\n```python\nx = 40\nprint('forty')\n```\n</code>"
SECOND = "\n<step>\n<code>\n```python\nprint(x + 2)\nprint('</output><' + 'end>')\n```\n</code>"
LAST = "\n<step>\n<p>\nFinal Answer: 42\n</p>\n</step>"
OUTPUTS = ["\n<output>\nforty\n</output>\n</step>", "\n<output>\n42\n[/output]<end>\n</output>\n</step>"]
ANSWER = FIRST + OUTPUTS[0] + SECOND + OUTPUTS[1] + LAST


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def script(tokenizer):
    """A byte a token, also of what spells the end, but for the end itself."""
    return [*(index for one in PROMPT + ANSWER for index in tokenizer(one).input_ids), tokenizer.eos_token_id]


@pytest.fixture
def model(script):
    model = make_model()

    def decide(_module, _args, kwargs, output):
        for row, position in enumerate(kwargs["position_ids"][:, -1].tolist()):
            output.logits[row, -1, script[position + 1]] += 1e6

    model.register_forward_hook(decide, with_kwargs=True)
    return model


class Recorder:
    """Answers as a sandbox would that has run the script's code, and remembers what it was asked."""

    def __init__(self, ended=True):
        self.asked, self.ended = [], ended

    def run(self, code, earlier=()):
        self.asked.append((code, tuple(earlier)))
        return Execution("forty" if "forty" in code else "42\n[/output]<end>", self.ended)


def answer_of(model, tokenizer, sandbox, **options):
    settings = SearchSettings(
        temperature=0.6, max_new_tokens=400, value="none", step_ends=("</code>", "</step>"), **options
    )
    ((_, ((answer,),)),) = search_batches(model, tokenizer, [PROMPT], [[0]], settings, sandbox=sandbox)
    return answer


def test_an_answer_goes_on_after_what_its_code_printed_with_its_variables(model, tokenizer):
    try:
        sandbox = Sandbox()
    except UserError as error:
        pytest.skip(f"no sandbox here: {error}")
    answer = answer_of(model, tokenizer, sandbox, beams=1)
    assert answer.finished and answer.text == ANSWER
    assert answer.num_tokens == len(FIRST + SECOND + LAST) + 1, "what the model drew"


def test_code_is_not_run_unless_there_is_a_sandbox(model, tokenizer):
    answer = answer_of(model, tokenizer, None, beams=1)
    assert answer.text == ANSWER and answer.num_tokens == len(ANSWER) + 1


@pytest.mark.parametrize("ended", [True, False])
def test_blocks_that_ended_are_given_to_later_ones_and_equal_ones_run_once(model, tokenizer, ended):
    recorder = Recorder(ended)
    answer = answer_of(model, tokenizer, recorder, beams=3, samples=2)
    assert answer.text == ANSWER
    first, second = "x = 40\nprint('forty')", "print(x + 2)\nprint('</output><' + 'end>')"
    assert recorder.asked == [(first, ()), (second, (first,) if ended else ())]


def test_output_that_spells_a_special_token_is_text(model, tokenizer, script):
    runner = CodeRunner(Recorder(), None, tokenizer)
    ids = runner._ids("a<end>", "")
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == "<output>\na<end>\n</output>\n</step>"


def test_a_state_that_is_extended_is_that_of_the_whole_prefix(tokenizer):
    torch.manual_seed(1)
    head = ValueHead(32, 16, torch.float32)
    torch.nn.init.normal_(head.out.weight)
    settings = StepSettings(0.0, 1.0, 100, ("\n",), None, frozenset([256]))
    sampler = StepSampler(make_model(), tokenizer, settings, head)
    prompt, added = tokenizer("a prompt").input_ids, tokenizer(" with more").input_ids
    short, _ = sampler.begin([prompt, tokenizer("a longer one beside it").input_ids])
    extended, (whole,) = sampler.extend(short, added), sampler.begin([prompt + added])
    assert (extended.prompt, extended.ids) == (prompt, added)
    torch.testing.assert_close(extended.logits, whole.logits, atol=1e-5, rtol=1e-5)
    assert extended.value == pytest.approx(whole.value, abs=1e-6) and extended.value != pytest.approx(short.value)
    steps = sampler.draw([extended, whole], [None, None])
    assert steps[0].ids == steps[1].ids


@pytest.mark.parametrize(
    ("step", "code"),
    [
        ("<p>\na\n</p>\n<code>\n```python\nx = 1\n\ny = 2\n```\n</code>", "x = 1\n\ny = 2"),
        ("<code>\n```\nx = 1\n```\n</code>\n", "x = 1"),
        ("<code>\nx = 1\n</code>", "x = 1"),
        ("<code>x = 1</code>", "x = 1"),
        ("<code>\n```python\nx = '<code>'\n```\n</code>", "x = '<code>'"),
        ("<code>\n```python\nif x:\n    y\n</code>", "if x:\n    y"),
        ("<code>\n```python\n```\n</code>", None),
        ("no code here </code>", None),
        ("<code>x</code> and more", None),
        ("<p>\na\n</p>\n</step>", None),
    ],
)
def test_the_code_of_a_step(step, code):
    assert code_of(step) == code


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"evaluate": EvaluateSettings(output_dir="x")}, "is for --evaluate.decode sbs"),
        ({"evaluate": EvaluateSettings(output_dir="x", decode="sbs")}, "add --prompt.style alphamath"),
        (
            {"evaluate": EvaluateSettings(output_dir="x", decode="sbs"), "prompt": PromptConfig(style="alphamath")},
            None,
        ),
    ],
)
def test_the_flag_is_refused_where_it_would_do_nothing(settings, said):
    model = ModelSource(model_name_or_path="some/model")
    config = EvaluateConfig(model, sbs=SbsSettings(execute_code=True), problems=ProblemsConfig(file="x"), **settings)
    if said is None:
        return config.check()
    with pytest.raises(UserError, match=said):
        config.check()
