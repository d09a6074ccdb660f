"""What a model is shown of a problem: worked examples first, in the template that it was trained with."""

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.input_template import fill_template
from pipa_openrlhf.data.record import Unusable
from pipa_openrlhf.data.render import apply_template
from pipa_openrlhf.data.special_text import NOT_AS_TEXT, is_shielded, special_text
from pipa_openrlhf.data.tokenise import encode
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.config import FEW_SHOT_FLAG, WriterConfig
from pipa_openrlhf.generate.problems import Problem, question_of, read_rows

ALPHAMATH_TEMPLATE = "<question> {} </question>\n"
_BETWEEN_EXAMPLES = "\n\n"
_WORKED_KEYS = ("solution", "completion", "answer")

_Example = tuple[str, str]


def write_prompts(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase, config: WriterConfig
) -> tuple[list[str], str | None]:
    """The prompts, shielded as ``special_text.py`` says, and the text that begins another problem.

    A model that was shown worked examples may go on with a problem of its own where its answer should end. There is
    no such text without examples, in a chat, or where the template has nothing before the question.

    Raises:
        UserError: the file of examples cannot be read, or a template or a question cannot be used.
    """
    template = ALPHAMATH_TEMPLATE if config.prompt.style == "alphamath" else config.data.input_template
    examples = read_examples(config.prompt.few_shot, config.prompt.shots) if config.prompt.few_shot else []
    in_chat, mode = config.data.apply_chat_template, config.data.special_tokens
    special = special_text(tokenizer)

    def as_text(text: str) -> str:
        return text if mode == "prompt" and not in_chat else special.shield(text)

    try:
        shown = [(as_text(asked), as_text(worked)) for asked, worked in examples]
    except Unusable as reason:
        raise UserError(f"{FEW_SHOT_FLAG} {config.prompt.few_shot}: {reason}; change the worked examples") from reason
    before = ""
    if not in_chat:
        before = "".join(f"{fill_template(asked, template)}{worked}{_BETWEEN_EXAMPLES}" for asked, worked in shown)

    def write(problem: Problem) -> str:
        question = as_text(problem.question)
        return _chat(question, shown, tokenizer) if in_chat else before + fill_template(question, template)

    prompts = []
    for problem in problems:
        try:
            prompt = write(problem)
            if is_shielded(prompt):
                _check(prompt, tokenizer, mode)
        except Unusable as reason:
            remedy = "change the question or the worked examples, or give --data.tokenizer_chat_template"
            raise UserError(f"problem {problem.problem_id}: {reason}; {remedy}") from reason
        prompts.append(prompt)
    head = template.partition("{}")[0].strip() if template and examples and not in_chat else ""
    return prompts, f"\n{head}" if head else None


def _check(prompt: str, tokenizer: PreTrainedTokenizerBase, mode: str) -> None:
    if mode == "refuse":
        raise Unusable("text of a special token, and --data.special_tokens is refuse")
    if encode([prompt], tokenizer) == [None]:
        raise Unusable(NOT_AS_TEXT)


def read_examples(path: str, most: int | None) -> list[_Example]:
    """Questions with worked answers, from a file as ``read_problems`` takes it.

    The worked answer is ``steps``, a line each, or else ``solution`` (MATH), ``completion``, or ``answer`` (GSM8K).

    Raises:
        UserError: no such file, or a row that has neither.
    """
    examples = []
    for where, row in read_rows(path, most, split="train", flag=FEW_SHOT_FLAG):
        steps = row.get("steps")
        worked = "\n".join(map(str, steps)) if isinstance(steps, list) else None
        worked = worked or next((row[key] for key in _WORKED_KEYS if isinstance(row.get(key), str)), None)
        if not worked or not worked.strip():
            raise UserError(
                f"{where}: an example needs a worked answer in `steps`, `solution`, `completion` or `answer`"
            )
        examples.append((question_of(row, where), worked.strip()))
    if most is not None and len(examples) < most:
        raise UserError(f"{FEW_SHOT_FLAG} {path}: has {len(examples)} examples, not the {most} of --prompt.shots")
    return examples


def _chat(question: str, examples: list[_Example], tokenizer: PreTrainedTokenizerBase) -> str:
    messages = []
    for asked, worked in examples:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": worked}]
    messages.append({"role": "user", "content": question})
    return apply_template(tokenizer, messages, add_generation_prompt=True)
