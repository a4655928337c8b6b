"""What the tests of band_topk share: embeddings, rules and the comparison.

The embeddings lie on a grid of multiples of 2^-12, or 2^-24 where the edges of the band matter:
their inner products are then exact in float64 in any order of summation, so equality is exact and
ties are real ties.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from backends import Backend
from hypothesis import strategies as st
from torch import Tensor

import refine_fast as rf
from refine_fast import reference


def unit_rows(rows: int, width: int, seed: int, bits: int = 12) -> Tensor:
    x = torch.nn.functional.normalize(
        torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    return torch.round(x * 2**bits) / 2**bits


def tied(rows: int, count: int, width: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Queries, documents of which four are the same, and what each query excludes."""
    queries, docs = unit_rows(rows, width, 0), unit_rows(count, width, 1)
    if count > 20:
        docs[[10, 11, count - 1]] = docs[3].clone()
    generator = torch.Generator().manual_seed(2)
    return (
        queries,
        docs,
        [
            torch.randint(0, max(count, 1), (i % 5 if count else 0,), generator=generator)
            for i in range(rows)
        ],
    )


INFINITE = (-float("inf"), float("inf"))
BANDS = [(-0.2, 0.4), (0.1, 0.3), (-2.0, 2.0), (0.99, 1.0), INFINITE]
COUNTS = [(0, 0), (0, 5), (1, 0), (10, 5), (400, 600), (1, 2**31 - 1)]
# (k, skip, band, with exclude, with ceiling): every two of them together on a CPU, a few on a GPU,
# whose emulation takes seconds for each
CPU_RULES = [
    (k, skip, band, both, both)
    for (i, band), (j, (k, skip)) in itertools.product(enumerate(BANDS), enumerate(COUNTS))
    for both in [(i + j) % 2 == 0]
]
GPU_RULES = [
    (10, 5, (-0.2, 0.4), False, False),
    (10, 5, (0.1, 0.3), True, True),
    (400, 600, (-2.0, 2.0), True, False),
    (1, 0, INFINITE, False, False),
    (0, 0, (0.0, 0.2), False, True),
]


@cache
def sorted_once(
    shape: tuple[int, int, int], order: str, select: str, gpu: bool
) -> list[tuple[dict[str, Any], tuple[Tensor, Tensor, Tensor]]]:
    """Arguments of a search and what the sort gives, which takes longer than every level's search;
    it is the same for each."""
    queries, docs, exclude = tied(*shape)
    generator = torch.Generator().manual_seed(3)
    # on a GPU each rule with either order and with either selection
    odd = (order == "band_then_skip") != (select == "random")
    rules = GPU_RULES[odd::2] if gpu else CPU_RULES
    found = []
    for k, skip, band, with_exclude, with_ceiling in rules:
        ceiling = torch.rand(len(queries), generator=generator)
        asked: dict[str, Any] = {"queries": queries, "docs": docs, "k": k, "band": band}
        asked |= {"skip": skip, "order": order, "select": select, "seed": 7}
        asked["exclude"] = exclude if with_exclude else None
        asked["ceiling"] = ceiling if with_ceiling else None
        found.append((asked, reference.band_topk(**asked)))
    return found


def near_an_edge(edge: float, count: int) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """Queries, documents and bands: the scores lie within 1e-7 of the bands' edges on both sides,
    which no screen can tell apart."""
    width = 40
    generator = torch.Generator().manual_seed(5)
    queries, docs = torch.zeros(16, width), torch.zeros(count, width)
    queries[:, 0], queries[:, 1] = 1, 2**-12
    docs[:, 0] = torch.round(torch.tensor(edge) * 2**20) / 2**20
    # contributes multiples of 2^-36, up to 3e-8
    docs[:, 1] = torch.randint(-2048, 2048, (count,), generator=generator) * 2.0**-24
    noise = torch.randint(-8, 8, (count, width - 2), generator=generator) * 2.0**-6
    queries[:, 2:], docs[:, 2:] = (
        torch.randint(-1, 2, (16, width - 2), generator=generator) * 2.0**-20,
        noise,
    )
    scores = queries.double() @ docs.double().T
    exact = float(scores.median())
    assert (scores - exact).abs().max() < 1e-5
    assert ((scores - exact).abs() < 1e-7).sum() > 100
    return (
        queries,
        docs,
        [(exact, 2.0), (-2.0, exact), (exact, exact), (exact - 1e-7, exact + 1e-7)],
    )


@st.composite
def searches(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """Queries, documents, k and the other arguments of any search, edges that some score equals
    among them."""
    rows, count, width = (
        draw(st.integers(1, 20)),
        draw(st.integers(0, 700)),
        draw(st.integers(1, 80)),
    )
    seed, bits = draw(st.integers(0, 2**31)), draw(st.sampled_from([2, 6, 12]))
    queries, docs = unit_rows(rows, width, seed, bits), unit_rows(count, width, seed + 1, bits)
    scores = (queries.double() @ docs.double().T).flatten()
    edge = st.sampled_from(scores.tolist()) if count else st.just(0.0)
    nudge = st.sampled_from([0.0, 1e-7, -1e-7, 1e-16, 0.1, -0.1, 3.0])
    ids = st.lists(st.integers(0, count - 1), max_size=6) if count else st.just([])
    ceilings = torch.tensor([draw(edge) for _ in range(rows)], dtype=torch.float64)
    rule = {
        "band": tuple(sorted((draw(edge) + draw(nudge), draw(edge) + draw(nudge)))),
        "skip": draw(st.integers(0, 12)),
        "exclude": [draw(ids) for _ in range(rows)],
        "ceiling": draw(st.sampled_from([None, ceilings])),
        "order": draw(st.sampled_from(["skip_then_band", "band_then_skip"])),
        "select": draw(st.sampled_from(["hardest", "random"])),
        "seed": draw(st.integers(-(2**63), 2**63 - 1)),
    }
    return queries, docs, draw(st.integers(0, 40)), rule


def assert_same(ours: rf.BandTopK, gold: tuple[Tensor, Tensor, Tensor]) -> None:
    differing = (ours.ids != gold[0]).any(1).nonzero().flatten().tolist()
    for row in differing[:1]:
        pytest.fail(f"query {row}: {ours.ids[row].tolist()}, not {gold[0][row].tolist()}")
    assert torch.equal(ours.in_band, gold[2])
    torch.testing.assert_close(ours.scores, gold[1], rtol=0, atol=0, equal_nan=True)


def search(backend: Backend, queries: Tensor, docs: Any, k: int, **rule: Any) -> rf.BandTopK:
    """On the backend's device, the documents too if they are a tensor; the result on the CPU."""
    docs = docs.to(backend.device) if isinstance(docs, Tensor) else docs
    found = rf.band_topk(queries.to(backend.device), docs, k, **rule)
    return rf.BandTopK(*(x.cpu() for x in found))


def check(backend: Backend, queries: Tensor, docs: Tensor, k: int, **rule: Any) -> rf.BandTopK:
    """Searches and compares with the float64 sort of reference.py."""
    ours = search(backend, queries, docs, k, **rule)
    assert_same(ours, reference.band_topk(queries, docs, k, **rule))
    return ours


@contextmanager
def interrupts() -> Iterator[None]:
    """Ctrl-C after 0.3 s ends what runs. The thread that sends it runs at all because the GIL is
    released."""
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        yield
