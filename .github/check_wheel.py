"""Runs the three operations of an installed wheel against refine_fast.reference: needs torch, numpy
and safetensors alone.
 Each repaired wheel is checked by it (``tool.cibuildwheel`` in pyproject.toml), from a folder
outside the checkout.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import refine_fast as rf
from refine_fast import reference


def check_info_nce() -> None:
    """Compares the loss and both gradients."""
    q, d = torch.randn(33, 48), torch.randn(70, 48)
    results = []
    for info_nce in (rf.info_nce, reference.info_nce):
        leaves = [x.clone().requires_grad_() for x in (q, d)]
        loss = info_nce(*leaves, temperature=0.05, normalize=True)
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def check_band_topk() -> None:
    """Compares ids, scores and the number of documents in the band."""
    queries, docs = torch.randn(17, 48), torch.randn(500, 48)
    options = {"k": 5, "band": (0.1, 0.3), "skip": 2, "normalize": True}
    ours = rf.band_topk(queries, docs, **options)
    expected = reference.band_topk(queries.double(), docs.double(), **options)
    assert torch.equal(ours.ids, expected[0])
    torch.testing.assert_close(ours.scores.double(), expected[1].double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.in_band, expected[2])


def check_fuse() -> None:
    """Compares a fused checkpoint with torch.lerp, bit by bit."""
    base, tuned = (
        {"w": torch.randn(1000).to(torch.bfloat16), "b": torch.randn(7)} for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.safetensors" for name in ("base", "tuned", "fused")]
        save_file(base, paths[0])
        save_file(tuned, paths[1])
        rf.fuse(*paths, weight=0.35)
        fused = load_file(paths[2])
    for name in base:
        expected = torch.lerp(base[name].float(), tuned[name].float(), 0.35).to(base[name].dtype)
        assert torch.equal(fused[name], expected), name


if __name__ == "__main__":
    torch.manual_seed(0)
    for check in (check_info_nce, check_band_topk, check_fuse):
        for level in rf.available_isas():
            rf.force_isa(level)
            check()
    print(
        f"refine_fast {rf.__version__} in {Path(rf.__file__).parent}: "
        f"the operations agree at {', '.join(rf.available_isas())}"
    )
