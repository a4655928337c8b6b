"""torch's default device and default dtype are the caller's, and decide nothing here: with buffers
of another device or size the kernels would write anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import refine_fast as rf
from refine_fast.mine import calibrate_band, mine


@contextmanager
def default(name: str) -> Iterator[None]:
    if name == "meta":  # as "cuda" would be
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


each_default = pytest.mark.parametrize("name", ["meta", "float64", "bfloat16"])


RNG = np.random.default_rng(0)
QUERIES, DOCS = (RNG.standard_normal((n, 16)).astype(np.float32) for n in (40, 300))
POSITIVES = [[i] for i in range(40)]


def search() -> list[torch.Tensor]:
    rule = {"band": (-0.5, 0.5), "skip": 2, "normalize": True, "ceiling": np.full(40, 0.3)}
    halves = (DOCS[:150], DOCS[150:])
    parts = [
        rf.band_topk_part(QUERIES, half, 5, id_offset=150 * i, **rule)
        for i, half in enumerate(halves)
    ]
    return [*rf.band_topk(QUERIES, DOCS, 5, **rule), *rf.merge_band_topk(parts)]


def negatives() -> list[torch.Tensor]:
    band = calibrate_band(QUERIES, DOCS, POSITIVES, k=3, skip=0, normalize=True)
    found = mine(QUERIES, DOCS, POSITIVES, k=3, band=band, relative_margin=0.05, normalize=True)
    return [found.ids, found.scores, torch.from_numpy(np.array(band))]


def groups() -> list[torch.Tensor]:
    return [rf.best_of_groups(QUERIES, DOCS, range(0, 301, 3))]


@each_default
@pytest.mark.parametrize("work", [search, negatives, groups])
def test_searches(work: Callable[[], list[torch.Tensor]], name: str) -> None:
    expected = work()
    with default(name):
        results = work()
    for found, right in zip(results, expected, strict=True):
        assert found.device.type == "cpu"
        torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)


@each_default
def test_the_loss(name: str) -> None:
    q, d = torch.from_numpy(QUERIES), torch.from_numpy(DOCS)

    def work() -> list[torch.Tensor]:
        leaf = q.clone().requires_grad_()
        loss = rf.info_nce(leaf, d, temperature=0.5)
        loss.backward()
        return [loss.detach(), leaf.grad]

    expected = work()
    with default(name):
        results = work()
    for found, right in zip(results, expected, strict=True):
        assert (found.device.type, found.dtype) == ("cpu", torch.float32)
        torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)


@each_default
def test_a_merge_into_a_model(tmp_path: Path, name: str) -> None:
    model = torch.nn.Linear(8, 8)
    save_file({name: x + 1 for name, x in model.state_dict().items()}, tmp_path / "t.safetensors")
    expected = {name: x + 0.5 for name, x in model.state_dict().items()}
    with default(name):
        rf.fuse_into(model, tmp_path / "t.safetensors", 0.5)
    for parameter, right in expected.items():
        torch.testing.assert_close(model.state_dict()[parameter], right)
