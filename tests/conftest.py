"""Fixtures that every part of the tests shares."""

import pytest
from tiny import make_model, make_tokenizer


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """Folders of two different tiny models with one tokenizer: ``policy`` and ``prior``."""
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 0), ("prior", 1)):
        make_model(seed).save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return root
