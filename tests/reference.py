"""An independent float64 computation of PIPA's batch loss, straight from METHOD's formulas and whole logits."""

import math

import numpy as np
import torch
from transformers import AutoModelForCausalLM


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
