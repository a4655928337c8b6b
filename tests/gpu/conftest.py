"""The Triton kernels run on a GPU where there is one, and interpreted on CPU tensors (see
tests/conftest.py) where there is none: the same cases either way."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
