"""An independent float64 computation of every objective, with whole logits and plain loops."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM

EOS = 257
BETA = 0.1


def token_log_probs(folder, prompt_ids: list[int], response_ids: list[int]) -> np.ndarray:
    """[T] float64 log-probs of the response."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + response_ids])).logits[0]
    log_probs = torch.log_softmax(logits, dim=-1)
    first = len(prompt_ids) - 1
    return np.array([log_probs[first + t, token].item() for t, token in enumerate(response_ids)])


def value_logits(folder, head: dict, prompt_ids: list[int], response_ids: list[int]) -> np.ndarray:
    """[T] float64 u_t from the head's weights and the hidden states that predict the response."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        hidden = model.model(torch.tensor([prompt_ids + response_ids])).last_hidden_state[0]
        hidden = hidden[len(prompt_ids) - 1 : -1]
        weights = {name: tensor.double() for name, tensor in head.items()}
        inner = torch.relu(hidden @ weights["dense.weight"].T + weights["dense.bias"])
        return (inner @ weights["out.weight"].T + weights["out.bias"])[:, 0].numpy()


def pipa_loss(variant, reduction, sequences) -> float:
    """Loss of a batch of (log_f [T], log_p [T], u [T], labels [T])."""
    per_sequence = []
    for log_f, log_p, u, labels in sequences:
        losses = []
        for t, c in enumerate(labels):
            log_g, r = -math.log1p(math.exp(-u[t])), log_f[t] - log_p[t]
            if variant == "m":
                F = math.exp(r + log_g)
                losses.append(-math.log(F) if c else -math.log(1 - min(F, 1 - 1e-10)))
            else:
                F = 1 / (1 + math.exp(-(r + u[t])))
                losses.append(-math.log(F) if c else -math.log(1 - F))
        per_sequence.append(losses)
    if reduction == "token_mean":
        return sum(map(sum, per_sequence)) / sum(map(len, per_sequence))
    if reduction == "sequence_mean":
        return sum(sum(losses) / len(losses) for losses in per_sequence) / len(per_sequence)
    return sum(map(sum, per_sequence)) / len(per_sequence)


@dataclass(frozen=True)
class Scored:
    """One answer with everything that a formula needs, one entry a response token."""

    prompt: str
    response: list[int]
    labels: list[int]
    step_ids: list[int]
    right: int
    log_f: list[float]
    log_p: list[float]

    @property
    def r(self) -> list[float]:
        return [f - p for f, p in zip(self.log_f, self.log_p)]

    @property
    def R(self) -> float:
        return sum(self.r)


def ids(text: str) -> list[int]:
    return make_tokenizer()(text, add_special_tokens=False).input_ids


def scored(models, prompt: str, steps: list[str], labels: list[int], annotation: str) -> Scored:
    """Tokens by the text rule: a separator belongs to the step before it, eos to the last step."""
    texts = [step + "\n" for step in steps[:-1]] + [steps[-1]]
    tokens = [ids(text) for text in texts]
    tokens[-1] = tokens[-1] + [EOS]
    response = sum(tokens, [])
    step_labels = labels if annotation == "step" else [labels[-1]] * len(labels)
    return Scored(
        prompt=prompt,
        response=response,
        labels=[label for label, some in zip(step_labels, tokens) for _ in some],
        step_ids=[number for number, some in enumerate(tokens) for _ in some],
        right=labels[-1],
        log_f=list(token_log_probs(models / "policy", ids(prompt), response)),
        log_p=list(token_log_probs(models / "prior", ids(prompt), response)),
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def pairs_of(answers: list[Scored]) -> list[tuple[Scored, Scored]]:
    return list(zip(answers[0::2], answers[1::2]))


def dpo(answers: list[Scored], smoothing: float = 0.0, step_loss: str = "") -> float:
    """Mean over pairs; ``l0`` leaves the right steps of the rejected answer out, ``l1`` changes no value."""
    losses = []
    for chosen, rejected in pairs_of(answers):
        left_out = sum(r for r, c in zip(rejected.r, rejected.labels) if c) if step_loss == "l0" else 0.0
        preferred = sigmoid(BETA * (chosen.R - (rejected.R - left_out)))
        losses.append(-(1 - smoothing) * math.log(preferred) - smoothing * math.log(1 - preferred))
    return mean(losses)


def ipo(answers: list[Scored]) -> float:
    return mean((chosen.R - rejected.R - 1 / (2 * BETA)) ** 2 for chosen, rejected in pairs_of(answers))


def chosen_nll(answers: list[Scored]) -> float:
    """OpenRLHF's NLL term: mean over a chosen answer's tokens, then over chosen answers."""
    return mean(-mean(one.log_f) for one in answers if one.right)


def sft_term(answers: list[Scored]) -> float:
    """Mean over an answer's right tokens, then over the answers that have any."""
    right = [[f for f, c in zip(one.log_f, one.labels) if c] for one in answers]
    return mean(-mean(some) for some in right if some)


def mismatch_ratios(models, answers: list[Scored], max_len: int = 512) -> list[float | None]:
    """R of every prompt with the answer of the next record, cyclically, that is of another problem and fits."""
    ratios = []
    for i, own in enumerate(answers):
        others = [answers[(i + step) % len(answers)] for step in range(1, len(answers))]
        room = max_len - len(ids(own.prompt))
        fitting = [one.response for one in others if one.prompt != own.prompt and len(one.response) <= room]
        if fitting:
            log_f, log_p = (
                token_log_probs(models / name, ids(own.prompt), fitting[0]) for name in ("policy", "prior")
            )
            ratios.append(float((log_f - log_p).sum()))
        else:
            ratios.append(None)
    return ratios


def reference_point(ratios: list[float | None]) -> float:
    """z0 of the answers of one batch: the mean of their mismatches' R, at least 0."""
    known = [ratio for ratio in ratios if ratio is not None]
    return max(0.0, mean(known)) if known else 0.0


def kto_term(R: float, right: int, z0: float, weights=(1.0, 1.0)) -> float:
    return weights[0] * sigmoid(-BETA * (R - z0)) if right else weights[1] * sigmoid(-BETA * (z0 - R))


def kto(answers: list[Scored], z0: float, weights=(1.0, 1.0)) -> float:
    return mean(kto_term(one.R, one.right, z0, weights) for one in answers)


def step_kto(answers: list[Scored], z0: float) -> float:
    """One term a step, summed over an answer's steps."""
    losses = []
    for one in answers:
        total = 0.0
        for number in range(max(one.step_ids) + 1):
            inside = [t for t, step in enumerate(one.step_ids) if step == number]
            total += kto_term(sum(one.r[t] for t in inside), one.labels[inside[0]], z0)
        losses.append(total)
    return mean(losses)


def answer_metrics(answers: list[Scored], scale: float) -> dict[str, float]:
    """What every objective with a prior logs, by hand."""
    right, wrong = ([one for one in answers if one.right == label] for label in (1, 0))
    chosen, rejected = mean(one.R for one in right), mean(one.R for one in wrong)
    return {
        "rewards/chosen": scale * chosen,
        "rewards/rejected": scale * rejected,
        "rewards/margins": scale * (chosen - rejected),
        "logratio/chosen": chosen,
        "logratio/rejected": rejected,
        "logps/chosen": mean(sum(one.log_f) for one in right),
        "logps/rejected": mean(sum(one.log_f) for one in wrong),
    }
