"""Fixtures of the tests that compare with other libraries."""

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def two_threads_without_gradients_or_warnings() -> Iterator[None]:
    """No gradients, no warnings of diffusers and transformers, and only two threads, to leave cores to other tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)
