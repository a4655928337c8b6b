"""The Triton kernels run on a GPU where there is one, and on CPU tensors, interpreted (tests/conftest.py), where there is none: the same
cases either way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """What is allocated and not written is NaN, or the largest integer: what a kernel leaves out cannot pass for an earlier result."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def interpreted_bf16(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter keeps bf16 as its 16 bits and multiplies those as integers in ``tl.dot``; here it multiplies the values."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    dot = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest))
    yield
