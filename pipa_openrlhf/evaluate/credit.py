"""Credit assignment: what a trained model says of every token of an answer, as ``report`` draws it.

g_t is the value head's probability that the token is right, before it is read. r_t = log f_t - log p_t is its implicit
reward: how much more likely the policy finds it than the prior does (docs/method.md).
"""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipa_openrlhf.data.layouts.fields import show
from pipa_openrlhf.data.samples import Sample, Samples
from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.output_head import only_accepted
from pipa_openrlhf.model.value_model import ValueModel
from pipa_openrlhf.training.records import read_args

Numbers = list[float | None]


def prior_of(model: str) -> str:
    """Name or folder of the prior that a trained model was compared with.

    Raises:
        UserError: the folder does not say so: it was not made by a run here.
    """
    args = read_args(model) or {}
    prior = args.get("prior.model_name_or_path") or args.get("model.model_name_or_path")
    if prior is None:
        raise UserError(
            f"{os.path.join(model, 'args.json')} does not say what {model} was trained from: give --credit.prior"
        )
    return prior


def chosen(samples: Samples, problems: Sequence[str], most: int) -> list[Sample]:
    """Answers to ``problems``, all of them; without problems the first ``most`` of the data.

    Raises:
        UserError: a problem has no answer in the data.
    """
    if not problems:
        return list(samples[:most])
    found = [sample for sample in samples if sample.problem_id in problems]
    missing = sorted(set(problems) - {sample.problem_id for sample in found})
    if missing:
        some = ", ".join(dict.fromkeys(show(sample.problem_id) for sample in samples[:3]))
        raise UserError(f"--credit.problems {show(missing[0])}: no answer to it in the data, which has {some}, ...")
    return found


def token_values(value_model: ValueModel, samples: Sequence[Sample]) -> list[Numbers]:
    """g of every response token of each sample; None of a first token that nothing precedes."""
    after = value_model.token_values([sample.input_ids.tolist() for sample in samples])
    # What judges a token is read after the one before it.
    return [_of_response(values[:-1], sample) for values, sample in zip(after, samples)]


@torch.inference_mode()
def token_log_probs(lm: PreTrainedModel, samples: Sequence[Sample]) -> list[Numbers]:
    """Log-prob of every response token of each sample; None of a first token that nothing precedes."""
    found = []
    for sample in samples:
        ids = torch.as_tensor(sample.input_ids, dtype=torch.long, device=lm.device)
        logits = lm(input_ids=ids[None], **only_accepted(lm, use_cache=False)).logits[0, :-1]
        found.append(_of_response(-functional.cross_entropy(logits.float(), ids[1:], reduction="none"), sample))
    return found


def _of_response(of_later: "torch.Tensor | np.ndarray", sample: Sample) -> Numbers:
    """Args: of_later: [L - 1] numbers of all tokens of a sequence but its first."""
    numbers: Numbers = [None, *(float(number) for number in of_later)]
    return numbers[sample.prompt_len :]


def token_texts(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[str]]:
    """The prompt, and the text of each response token. A character of several tokens stands with the last of them."""
    texts: list[str] = []
    shown = ""
    for end in range(sample.prompt_len, len(sample.input_ids) + 1):
        # Decoding a token on its own would lose the space that some tokenizers put in front.
        ids = sample.input_ids[:end]
        whole = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if end < len(sample.input_ids):
            whole = whole.rstrip("\ufffd")
        texts.append(whole[len(shown) :])
        shown = whole
    return texts[0], texts[1:]


def credit_rows(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    values: list[Numbers] | None,
    log_f: list[Numbers],
    log_p: list[Numbers],
) -> Iterator[dict]:
    """A row an answer: ``problem_id``, ``prompt``, ``label`` of the answer, and ``tokens``, each with its ``text``,
    ``step``, ``label`` (None outside the loss), ``g`` (None without ``values``) and ``r``."""
    for number, sample in enumerate(samples):
        prompt, texts = token_texts(sample, tokenizer)
        of_tokens = values[number] if values is not None else [None] * len(texts)
        tokens = [
            {
                "text": text,
                "step": int(step),
                "label": int(label) if is_labelled else None,
                "g": None if g is None else round(g, 4),
                "r": None if f is None or p is None else round(f - p, 4),
            }
            for text, step, label, is_labelled, g, f, p in zip(
                texts, sample.step_ids, sample.labels, sample.mask, of_tokens, log_f[number], log_p[number]
            )
        ]
        label = int(sample.answer_label)
        yield {"problem_id": sample.problem_id, "prompt": prompt, "label": label, "tokens": tokens}
