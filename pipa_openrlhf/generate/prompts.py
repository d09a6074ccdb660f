"""From problems to the text that a model continues."""

from transformers import PreTrainedTokenizerBase

from pipa_openrlhf.data.render import Unusable, apply_template, fill_template, prompt_text
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.generate.config import FEW_SHOT_FLAG, GenerateConfig
from pipa_openrlhf.generate.problems import Problem, question_of, read_rows

ALPHAMATH_TEMPLATE = "<question> {} </question>\n"
_BETWEEN_EXAMPLES = "\n\n"
_WORKED_KEYS = ("solution", "completion", "answer")

Example = tuple[str, str]


def write_prompts(
    problems: list[Problem], tokenizer: PreTrainedTokenizerBase, config: GenerateConfig
) -> tuple[list[str], str | None]:
    """The prompts, and the text that begins another problem.

    A model that was shown worked examples may go on with a problem of its own where its answer should end. There is
    no such text without examples, in a chat, or where the template has nothing before the question.

    Raises:
        UserError: the file of examples cannot be read, or a template cannot be used.
    """
    template = ALPHAMATH_TEMPLATE if config.prompt.style == "alphamath" else config.data.input_template
    examples = read_examples(config.prompt.few_shot, config.prompt.shots) if config.prompt.few_shot else []
    if config.data.apply_chat_template:
        return [_chat(problem.question, examples, tokenizer) for problem in problems], None
    before = "".join(
        f"{fill_template(question, template)}{worked}{_BETWEEN_EXAMPLES}" for question, worked in examples
    )
    prompts = [before + prompt_text(problem.question, tokenizer, template) for problem in problems]
    head = template.partition("{}")[0].strip() if template and examples else ""
    return prompts, f"\n{head}" if head else None


def read_examples(path: str, most: int | None) -> list[Example]:
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


def _chat(question: str, examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> str:
    messages = []
    for asked, worked in examples:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": worked}]
    messages.append({"role": "user", "content": question})
    try:
        return apply_template(tokenizer, messages, add_generation_prompt=True)
    except Unusable as reason:
        raise UserError(f"{reason}; give --data.tokenizer_chat_template, or change the question") from reason
