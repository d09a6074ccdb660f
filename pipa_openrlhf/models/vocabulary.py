"""Do a model's vocabulary and the tokens of the data belong together? Asked of configs, before weights are loaded."""

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedTokenizerBase

from pipa_openrlhf.errors import UserError
from pipa_openrlhf.models.adapters import adapter_vocabulary, is_adapter, root_model
from pipa_openrlhf.models.loading import empty_causal_lm, load_tokenizer, only_from_disk


def check_vocabulary(path: str, flag: str, token_ids: np.ndarray, trust_remote_code: bool) -> None:
    """Refuse a model that has no embedding for some token of the data.

    Raises:
        UserError: names the flag and both sizes.
    """
    root, revision = root_model(path)
    try:
        config = AutoConfig.from_pretrained(
            root, revision=revision, trust_remote_code=trust_remote_code, local_files_only=only_from_disk(root)
        )
        own = None
        if is_adapter(path):  # one that was trained with more tokens brings their embeddings
            own = adapter_vocabulary(path, empty_causal_lm(path, torch.float32, trust_remote_code))
    except (OSError, ValueError, KeyError, SafetensorError):
        return  # loading the model says better what is wrong
    size = own or config.get_text_config().vocab_size
    if token_ids.max() >= size:
        raise UserError(
            f"{flag} {path}: the data has token id {token_ids.max()}, the model {size} tokens; "
            "its tokenizer belongs to another model"
        )


def check_same_tokens(
    path: str, flag: str, token_ids: np.ndarray, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool
) -> None:
    """Refuse a prior to which the data's token ids mean other text; one without a tokenizer is trusted.

    Raises:
        UserError: names the flag and a token.
    """
    try:
        other = load_tokenizer(path, trust_remote_code=trust_remote_code)
    except UserError:
        return
    for token_id, ours in zip(token_ids.tolist(), tokenizer.convert_ids_to_tokens(token_ids.tolist())):
        theirs = other.convert_ids_to_tokens(token_id)
        if theirs != ours:
            raise UserError(
                f"{flag} {path}: its tokenizer has {theirs!r} as token {token_id}, the policy's has {ours!r}; "
                "a prior must have the policy's tokenizer"
            )
