"""Answers of several turns: what other roles said, and headers, are outside every loss; ends of turns are inside."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipa_openrlhf.data.dataset import load_samples
from pipa_openrlhf.data.record import Record
from pipa_openrlhf.data.tokenise import tokenise

USER = {"role": "user", "content": "Q"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)
MARKED_WITHOUT_EOS = MARKED.replace("<eos>{% endgeneration %}", "{% endgeneration %}<eos>")
# As Qwen 3 does: a last message has a thought, if only an empty one.
THINKING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)
CALLING = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ '\n' }}{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for c in m['tool_calls'] or [] %}<call>{{ c['function'] | tojson }}</call>{% endfor %}"
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
)


def says(role: str, content: str | None, **more) -> dict:
    return {"role": role, "content": content, **more}


@pytest.fixture
def one(read_records, chat):
    def one(row: dict, template: str | None = None):
        """The sample of an unpaired row, or the reason why it was dropped."""
        chat.chat_template = template or chat.chat_template
        _, records = read_records([{"label": 1, **row}], apply_chat_template=True)
        samples, dropped = tokenise(records, chat, max_len=1000)
        return samples[0] if samples else next(iter(dropped.counts))

    return one


def parts(chat, sample) -> list[tuple[bool, str]]:
    """Stretches of the answer, each with whether it is inside the loss."""
    ids, stretches = sample.input_ids[sample.prompt_len :], []
    for token, inside in zip(ids.tolist(), sample.mask.tolist()):
        if not stretches or stretches[-1][0] != bool(inside):
            stretches.append((bool(inside), []))
        stretches[-1][1].append(token)
    return [(inside, chat.decode(tokens)) for inside, tokens in stretches]


TOOL_TURN = [says("assistant", "call"), says("tool", "42"), says("assistant", "so 42")]
TOOL_PARTS = [(True, "call<eos>"), (False, "\n<|tool|>\n42\n<|assistant|>\n"), (True, "so 42<eos>")]


@pytest.mark.parametrize("template", [None, MARKED, MARKED_WITHOUT_EOS])
def test_a_tools_turn_inside_an_answer_is_masked(one, chat, template):
    sample = one({"prompt": [USER], "completion": TOOL_TURN}, template)
    assert parts(chat, sample) == TOOL_PARTS
    assert chat.decode(sample.input_ids[: sample.prompt_len]) == "<|user|>\nQ\n<|assistant|>\n"


@pytest.mark.parametrize("template", [None, MARKED])
def test_any_other_roles_turn_is_masked(one, chat, template):
    turns = [says("assistant", "a"), says("user", "u"), says("assistant", "b"), says("system", "s")]
    sample = one({"prompt": [USER], "completion": [*turns, says("tool", "t"), says("assistant", "c")]}, template)
    assert parts(chat, sample) == [
        (True, "a<eos>"),
        (False, "\n<|user|>\nu\n<|assistant|>\n"),
        (True, "b<eos>"),
        (False, "\n<|system|>\ns\n<|tool|>\nt\n<|assistant|>\n"),
        (True, "c<eos>"),
    ]


@pytest.mark.parametrize("template", [None, MARKED])
def test_two_turns_of_the_assistant_have_a_header_between_them(one, chat, template):
    sample = one({"prompt": [USER], "completion": [says("assistant", "a"), says("assistant", "b")]}, template)
    assert parts(chat, sample) == [(True, "a<eos>"), (False, "\n<|assistant|>\n"), (True, "b<eos>")]


@pytest.mark.parametrize("template", [None, MARKED])
def test_a_tools_turn_in_the_prompt_stays_there(one, chat, template):
    sample = one({"prompt": [USER, *TOOL_TURN[:2]], "completion": TOOL_TURN[2:]}, template)
    assert parts(chat, sample) == [(True, "so 42<eos>")]
    head = "<|user|>\nQ\n<|assistant|>\ncall<eos>\n<|tool|>\n42\n<|assistant|>\n"
    assert chat.decode(sample.input_ids[: sample.prompt_len]) == head


@pytest.mark.parametrize("template", [None, MARKED])
def test_an_answer_may_begin_with_the_tools_turn(one, chat, template):
    sample = one({"prompt": [USER, TOOL_TURN[0]], "completion": TOOL_TURN[1:]}, template)
    assert parts(chat, sample) == [(False, "<|tool|>\n42\n<|assistant|>\n"), (True, "so 42<eos>")]


def test_a_template_that_writes_the_last_turn_in_another_way(one, chat):
    sample = one({"prompt": [USER], "completion": TOOL_TURN}, THINKING)
    expected = [*TOOL_PARTS[:2], (True, "<think></think>so 42<eos>")]
    assert parts(chat, sample) == expected


def test_a_template_without_an_end_of_turn(one, chat):
    template = MARKED.replace("<eos>", "").replace("{% generation %}", "").replace("{% endgeneration %}", "")
    sample = one({"prompt": [USER], "completion": TOOL_TURN}, template)
    assert parts(chat, sample) == [
        (True, "call"),
        (False, "\n<|tool|>\n42\n<|assistant|>\n"),
        (True, "so 42\n<eos>"),
    ]


def test_an_end_of_turn_that_is_not_the_eos_belongs_to_the_model(one, chat):
    template = chat.chat_template.replace("<eos>", "<end>")
    sample = one({"prompt": [USER], "completion": TOOL_TURN}, template)
    assert parts(chat, sample)[0] == (True, "call<end>")


@pytest.mark.parametrize(
    "template",
    [
        # the number of messages stands in front: what comes before a turn is no beginning of the whole
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ messages | length if loop.index > 1 }}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        MARKED.replace("m['role'] == 'assistant'", "m['role'] == 'nobody'"),
    ],
)
def test_a_template_that_does_not_show_the_turns_drops_the_record(one, template):
    reason = "the chat template does not show where the assistant's turns begin and end"
    assert one({"prompt": [USER], "completion": TOOL_TURN}, template) == reason


def test_marks_count_in_answers_of_one_turn_too(one, chat):
    template = MARKED.replace("{% generation %}", "note: {% generation %}")
    sample = one({"prompt": [USER], "completion": "a"}, template)
    assert parts(chat, sample) == [(False, "note: "), (True, "a<eos>")]


CUT = "m['content'].split('</think>')[-1]"


@pytest.mark.parametrize("template", [None, MARKED])
@pytest.mark.parametrize(
    "completion",
    [
        "<think>x</think>a",
        [says("assistant", "<think>x</think>a")],
        [says("assistant", "<think>x</think>a"), says("tool", "t"), says("assistant", "b")],
        [says("assistant", "b"), says("tool", "t"), says("assistant", "<think>x</think>a")],
    ],
)
def test_a_template_that_cuts_part_of_an_answer_drops_it(one, chat, template, completion):
    template = (template or chat.chat_template).replace("m['content']", CUT)
    assert one({"prompt": [USER], "completion": completion}, template) == (
        "the chat template leaves out part of the answer"
    )


def test_what_a_template_cuts_from_the_prompt_is_its_own_affair(one, chat):
    template = chat.chat_template.replace("m['content']", CUT)
    sample = one({"prompt": [USER, says("assistant", "x</think>y"), USER], "completion": "a"}, template)
    assert "y" in chat.decode(sample.input_ids) and "x" not in chat.decode(sample.input_ids)


@pytest.mark.parametrize("template", [None, MARKED, THINKING.replace("<think></think>", "")])
@pytest.mark.parametrize("as_messages", [False, True])
def test_a_prompt_that_ends_in_an_assistants_turn_is_continued(one, chat, template, as_messages):
    completion = [says("assistant", " and c")] if as_messages else " and c"
    sample = one({"prompt": [USER, says("assistant", "a b")], "completion": completion}, template)
    assert chat.decode(sample.input_ids[: sample.prompt_len]) == "<|user|>\nQ\n<|assistant|>\na b"
    assert parts(chat, sample) == [(True, " and c<eos>")]


def test_steps_after_a_prompt_that_is_continued(make_args, chat, write_rows):
    row = {"prompt": [USER, says("assistant", "a\n")], "completions": ["b", "c"], "labels": [1, 0]}
    args = make_args(apply_chat_template=True, annotation="step")
    [sample] = load_samples(args, chat, dataset=write_rows([row])).samples
    assert chat.decode(sample.input_ids) == "<|user|>\nQ\n<|assistant|>\na\nb\nc<eos>"
    assert sample.labels.tolist() == [1, 1, 0, 0]


@settings(max_examples=30, deadline=None)
@given(text=st.text("ab \n12", min_size=2, max_size=12), data=st.data())
def test_a_prefix_of_an_answer_and_its_rest_are_the_answer(tokenizers, read_records, text, data):
    tokenizer = tokenizers["characters"]
    tokenizer.chat_template = MARKED
    cut = data.draw(st.integers(1, len(text) - 1))
    rows = [
        {"prompt": [USER], "completion": text, "label": 1},
        {"prompt": [USER, says("assistant", text[:cut])], "completion": text[cut:], "label": 1},
    ]
    _, records = read_records(rows, apply_chat_template=True)
    samples, _ = tokenise(records, tokenizer, max_len=1000)
    whole, continued = samples
    assert whole.input_ids.tolist() == continued.input_ids.tolist()
    assert continued.prompt_len == whole.prompt_len + cut
    assert continued.mask.all()


def test_a_tool_call_without_content(one, chat):
    completion = [says("assistant", None, tool_calls=[CALL]), says("tool", "rain"), says("assistant", "Rain.")]
    sample = one({"prompt": [USER], "completion": completion}, CALLING)
    call = '<call>{"name": "weather", "arguments": {"city": "Bern"}}</call><eos>'
    assert parts(chat, sample) == [
        (True, call),
        (False, "\n<|tool|>\nrain\n<|assistant|>\n"),
        (True, "Rain.<eos>"),
    ]
    sample = one({"prompt": [USER], "completion": completion[:1]}, CALLING)
    assert parts(chat, sample) == [(True, call)]
    sample = one({"prompt": [USER, *completion[:2]], "completion": completion[2:]}, CALLING)
    assert parts(chat, sample) == [(True, "Rain.<eos>")]


IF_CONTENT = "{% if m['content'] %}{{ m['content'] }}{% endif %}"


@pytest.mark.parametrize("content", [IF_CONTENT, "{{ m['content'] }}", "{{ m['content'].strip() }}"])
def test_null_is_not_written_as_a_word(one, chat, content):
    completion = [says("assistant", None, tool_calls=[CALL]), says("tool", "None"), says("assistant", "None.")]
    sample = one({"prompt": [USER], "completion": completion}, CALLING.replace(IF_CONTENT, content))
    assert chat.decode(sample.input_ids).count("None") == 2


def test_a_template_that_leaves_the_tools_turn_out_drops_the_record(one):
    template = MARKED.replace("{% else %}", "{% elif m['role'] == 'user' %}")
    reason = "the chat template leaves out part of the answer"
    assert one({"prompt": [USER], "completion": TOOL_TURN}, template) == reason


def test_a_template_that_leaves_a_tool_call_out_drops_the_record(one):
    completion = [says("assistant", None, tool_calls=[CALL])]
    template = CALLING.replace("m['tool_calls'] or []", "[]")
    assert one({"prompt": [USER], "completion": completion}, template) == (
        "the chat template leaves out part of the answer"
    )


def test_nulls_that_parquet_adds_do_not_reach_the_template(read_records, chat):
    chat.chat_template = CALLING
    with_nulls = json.loads(json.dumps(CALL))
    with_nulls["function"]["arguments"] |= {"unit": None, "more": {"days": None, "hours": [None, {"at": None}]}}
    completion = [says("assistant", None, tool_calls=[{**with_nulls, "id": None}], name=None)]
    row = {"prompt": [says("user", "Q", tool_calls=None)], "completion": completion, "label": 1}
    _, [record] = read_records([row], apply_chat_template=True)
    assert record.prompt == [USER]
    [message] = record.messages
    assert message == says(
        "assistant",
        None,
        tool_calls=[
            {**CALL, "function": {**CALL["function"], "arguments": {"city": "Bern", "more": {"hours": [None, {}]}}}}
        ],
    )
    [sample], _ = tokenise([record], chat, max_len=1000)
    assert "unit" not in chat.decode(sample.input_ids) and "days" not in chat.decode(sample.input_ids)


def published_templates() -> list:
    """Chat templates of models, as TRL ships them."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).parent / "chat_templates" if spec else Path("nowhere")
    return sorted(folder.glob("*.jinja"))


PUBLISHED = published_templates()
TOOL_CALLS = [says("assistant", None, tool_calls=[{**CALL, "id": "abcdefghi"}])]
TOOL = says("tool", "TOOL SAYS", name="weather", tool_call_id="abcdefghi")
CONVERSATIONS = {
    "one turn": ([USER], [says("assistant", "Alpha beta.")]),
    "tool": ([USER], [says("assistant", "Alpha beta."), TOOL, says("assistant", "Gamma.")]),
    "call": ([USER], [*TOOL_CALLS, TOOL, says("assistant", "Gamma.")]),
    "user": ([USER], [says("assistant", "Alpha beta."), says("user", "USER SAYS"), says("assistant", "Gamma.")]),
    "continued": ([USER, says("assistant", "ALPHA")], [says("assistant", "Alpha beta.")]),
}


@pytest.mark.skipif(not PUBLISHED, reason="needs TRL's templates")
@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_published_templates_train_on_what_the_model_wrote_or_drop_the_record(chat, kind):
    prompt, answer = CONVERSATIONS[kind]
    chat.add_special_tokens({"bos_token": "<bos>"})
    used = 0
    for path in PUBLISHED:
        chat.chat_template = path.read_text().replace("<|im_end|>", "<eos>").replace("<|eot_id|>", "<eos>")
        record = Record(prompt, [answer[-1]["content"]], None, 1, "p", "x", messages=answer)
        samples, _ = tokenise([record], chat, max_len=100_000)
        for sample in samples:
            used += 1
            inside = "".join(text for is_inside, text in parts(chat, sample) if is_inside)
            outside = "".join(text for is_inside, text in parts(chat, sample) if not is_inside)
            for message in answer:
                if message["role"] != "assistant":
                    assert message["content"] not in inside and message["content"] in outside, path.name
                else:
                    assert (message["content"] or "weather") in inside, path.name
                    assert message["content"] is None or message["content"] not in outside, path.name
            assert "None" not in inside and inside.endswith("<eos>"), path.name
    assert used > len(PUBLISHED) / 3
