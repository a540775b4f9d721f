"""Fixtures of the tests that compare with other libraries."""

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def without_gradients_or_warnings() -> Iterator[None]:
    """No gradients, and no warnings of diffusers and transformers."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
