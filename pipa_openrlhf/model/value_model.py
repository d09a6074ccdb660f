"""A trained model with its value head, for inference: g, the probability that what comes next is right.

Training reads g at the tokens that it scores. Here it is read wherever it is asked for, from the state after a token:
what training calls g of a token is g after the token before it.
"""

import os
from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.model.loading import load_causal_lm
from pipa_openrlhf.model.output_head import decoder_of, only_accepted
from pipa_openrlhf.model.policy import HEAD_WEIGHTS_FILE, ValueHead, load_value_head
from pipa_openrlhf.prior.cache import file_sha256

_TOKENS_AT_ONCE = 8_192


class ValueModel:
    """g after the tokens of any sequences.

    Args:
        lm: on its device; its own settings are left alone.
        head: with float32 weights. Bfloat16 would give different states the same g, and search ranks by it.
        tokens_at_once: of one forward pass, padding included; a longer sequence is alone.
    """

    def __init__(self, lm: PreTrainedModel, head: ValueHead, tokens_at_once: int = _TOKENS_AT_ONCE):
        self.lm = lm.eval()
        self.head = head.to(lm.device)
        self._tokens_at_once = tokens_at_once

    def values(self, prefixes: Sequence[Sequence[int]]) -> list[float]:
        """g after the last token of each of ``prefixes``, token ids: it judges the token that would come next.

        Raises:
            ValueError: one is empty: there is no state before the first token.
        """
        return [float(values[-1]) for values in self._run(prefixes, only_last=True)]

    def token_values(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """For each of ``sequences``, token ids, [its length] float32: g after each of its tokens.

        Raises:
            ValueError: one is empty.
        """
        return self._run(sequences, only_last=False)

    @torch.inference_mode()
    def _run(self, sequences: Sequence[Sequence[int]], only_last: bool) -> list[np.ndarray]:
        if not all(map(len, sequences)):
            raise ValueError("a sequence without tokens has no state to read g from")
        found: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(sequences)
        for batch in self._batches(sequences):
            lengths = torch.tensor([len(sequences[index]) for index in batch])
            hidden = self._hidden([sequences[index] for index in batch])
            wanted = [states[:length] for states, length in zip(hidden, lengths)]
            if only_last:
                wanted = [states[-1:] for states in wanted]
            values = value_of(self.head, torch.cat(wanted)).cpu()
            for index, part in zip(batch, values.split([len(states) for states in wanted])):
                found[index] = part.numpy()
        return found

    def _batches(self, sequences: Sequence[Sequence[int]]) -> list[list[int]]:
        """Indices by falling length, so that there is little padding and memory runs out at once or never."""
        batches: list[list[int]] = []
        for index in sorted(range(len(sequences)), key=lambda index: -len(sequences[index])):
            if not batches or (len(batches[-1]) + 1) * len(sequences[batches[-1][0]]) > self._tokens_at_once:
                batches.append([])
            batches[-1].append(index)
        return batches

    def _hidden(self, sequences: list[Sequence[int]]) -> torch.Tensor:
        """[R, L, d] hidden states of sequences that are padded on the right, where nothing before them sees it."""
        width = max(map(len, sequences))
        ids = torch.zeros(len(sequences), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.as_tensor(sequence, dtype=torch.long)
            mask[row, : len(sequence)] = 1
        decoder, device = decoder_of(self.lm), self.lm.device
        options = only_accepted(decoder, use_cache=False)
        return decoder(input_ids=ids.to(device), attention_mask=mask.to(device), **options).last_hidden_state


def value_of(head: ValueHead, hidden: torch.Tensor) -> torch.Tensor:
    """[..., d] hidden states of any data type -> [...] g, float32."""
    return torch.sigmoid(head(hidden.to(head.dense.weight.dtype))).float()


def load_fitting_head(folder: str, lm: PreTrainedModel) -> ValueHead:
    """The value head exported to ``folder``, in float32.

    Raises:
        UserError: there is none, or it was trained on a model of another size.
    """
    head = load_value_head(folder, torch.float32)
    size = lm.config.get_text_config().hidden_size
    if head.dense.in_features != size:
        raise UserError(
            f"{os.path.join(folder, HEAD_WEIGHTS_FILE)}: made for hidden size {head.dense.in_features}, the model has "
            f"{size}; give the head that was trained with this model"
        )
    return head


def head_digest(folder: str) -> str:
    """Hex SHA-256 of the weights of the value head exported to ``folder``.

    Raises:
        UserError: there is none.
    """
    path = os.path.join(folder, HEAD_WEIGHTS_FILE)
    if not os.path.isfile(path):
        raise UserError(f"no value head in {folder}: {path} does not exist")
    return file_sha256(path)


def load_value_model(
    path: str, dtype: torch.dtype, attn_implementation: str = "sdpa", trust_remote_code: bool = False
) -> ValueModel:
    """The model exported to ``path`` (full weights, or an adapter whose base it names) with the value head there.

    Raises:
        UserError: there is no such model or no value head that fits it.
    """
    lm = load_causal_lm(path, dtype, attn_implementation, trust_remote_code)
    return ValueModel(lm, load_fitting_head(path, lm))
