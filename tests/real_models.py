"""Models that `attlas fetch` brings, for tests that skip without them."""

import pytest

from attlas.errors import UserError
from attlas.models.load import load, load_tokenizer


def fetched(name: str):
    """(model, tokenizer) of a model that was fetched; without it the test is skipped."""
    try:
        return load(name), load_tokenizer(name)
    except UserError as error:
        if "attlas fetch" not in str(error):
            raise
        pytest.skip(str(error))
