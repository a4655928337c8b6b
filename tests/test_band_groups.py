"""band_topk over groups of rows against the float64 sort, at every CPU level."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from banded import assert_same, near_an_edge, searches, unit_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import refine_fast as rf
from refine_fast import errors, reference
from refine_fast.errors import RefineFastWarning
from refine_fast.ops import band_topk as module

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.usefixtures("isa")]


def check(queries: Tensor, docs: Tensor, k: int, groups: np.ndarray, **rule: Any) -> None:
    gold = reference.band_topk(queries, docs, k, groups=torch.from_numpy(groups), **rule)
    assert_same(rf.band_topk(queries, docs, k, groups=groups, **rule), gold)


def offsets(*sizes: int) -> np.ndarray:
    return np.cumsum([0, *sizes])


RULES: list[dict[str, Any]] = [
    {"band": (-0.1, 0.4), "skip": 3, "select": select, "order": order, "seed": 5}
    for select, order in itertools.product(
        ("hardest", "random"), ("skip_then_band", "band_then_skip")
    )
]
# groups of one row; of a few; larger than a strip (at most 1,024 rows) before and after small ones
SIZES = [[1] * 400, [2, 9, 1, 4] * 60, [3, 1500, 2, 2, 2300, 1, 1] * 2]


@pytest.mark.parametrize("sizes", SIZES, ids=["ones", "few", "large"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_the_sort(sizes: list[int], rule: dict[str, Any]) -> None:
    groups = offsets(*sizes)
    queries, docs = unit_rows(37, 33, 0), unit_rows(int(groups[-1]), 33, 1)
    exclude = [[i % len(sizes), 3] for i in range(37)]
    ceiling = torch.linspace(0.1, 0.6, 37)
    check(queries, docs, 7, groups, **rule)
    check(queries, docs, 7, groups, **rule, exclude=exclude, ceiling=ceiling)


def test_a_group_larger_than_a_block() -> None:
    """At most 6 MiB of rows are packed at a time, 3,145 of 1,000 integers of 16 bits, and those of
    a group together."""
    groups = offsets(5, 6500, 2, 1, 700)
    queries, docs = unit_rows(3, 1000, 0), unit_rows(int(groups[-1]), 1000, 1)
    check(queries, docs, 2, groups, band=(-1.0, 0.12), skip=1)


@pytest.mark.parametrize("select", ["hardest", "random"])
def test_blocks_threads_and_shards_change_nothing(
    select: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = offsets(*[2, 9, 1, 4, 30] * 40)
    queries, docs = unit_rows(70, 24, 0), unit_rows(int(groups[-1]), 24, 1)
    rule: dict[str, Any] = {
        "band": (0.1, 0.5),
        "skip": 4,
        "select": select,
        "exclude": [[i, 2 * i] for i in range(70)],
    }
    gold = reference.band_topk(queries, docs, 9, groups=torch.from_numpy(groups), **rule)
    cuts = [0, 1, 90, 90, 200]
    parts = [
        rf.band_topk_part(
            queries,
            docs[groups[a] : groups[b]],
            9,
            id_offset=a,
            groups=groups[a : b + 1] - groups[a],
            **rule,
        )
        for a, b in itertools.pairwise(cuts)
    ]
    assert_same(rf.merge_band_topk(reversed(parts)), gold)
    for threads, memory, block in [
        (1, 1, 4 * 24 * 40),
        (2, 48 << 20, 1),
        (2, 1 << 20, 4 * 24 * 99),
    ]:
        torch.set_num_threads(threads)
        monkeypatch.setattr(module, "MEMORY", memory)
        monkeypatch.setattr(module, "BLOCK", block)
        assert_same(rf.band_topk(queries, docs.numpy(), 9, groups=groups.tolist(), **rule), gold)
    torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalize(dtype: torch.dtype) -> None:
    """The best row by cosine is not the best by inner product: rows differ in length."""
    groups = offsets(*[3, 5] * 40)
    queries, docs = unit_rows(20, 64, 0, bits=7).to(dtype), unit_rows(320, 64, 1, bits=7).to(dtype)
    docs *= 2.0 ** torch.arange(320).remainder(9).sub(4)[:, None].to(dtype)
    check(queries, docs, 6, groups, band=(0.05, 0.3), skip=2, normalize=True)


def test_edges_to_the_last_bit() -> None:
    """The margin of a group is that of its rows, not of the first, which nothing rounds here."""
    queries, docs, bands = near_an_edge(0.5, 600)
    rows = torch.stack([torch.zeros_like(docs), docs], 1).flatten(0, 1)
    for band in bands:
        check(queries, rows, 30, np.arange(0, 1201, 2), band=band)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(asked=searches(), largest=st.integers(1, 90), seed=st.integers(0, 2**31))
def test_any_rule(
    asked: tuple[Tensor, Tensor, int, dict[str, Any]], largest: int, seed: int
) -> None:
    """The documents of the rule are here the groups; each is repeated, worse, in its group."""
    queries, docs, k, rule = asked
    sizes = np.random.default_rng(seed).integers(1, largest + 1, len(docs))
    rows = docs.repeat_interleave(torch.from_numpy(sizes), 0)
    rows[1::2] /= 2
    check(queries, rows, k, offsets(*sizes), **rule)


def test_a_bad_row_is_named_by_its_group() -> None:
    docs = unit_rows(900, 24, 1)
    docs[457, 3] = float("nan")
    with pytest.raises(ValueError, match="a row of group 152 of docs holds NaN or Inf"):
        rf.band_topk(unit_rows(9, 24, 0), docs, 3, groups=np.arange(0, 901, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": [0, 4, 8]}, "groups must rise from 0 to 9, the number of docs"),
        ({"groups": [0, 4, 4, 9]}, "groups must rise at each step, but those of group 1"),
        (
            {"groups": [0, 4, 9], "exclude": [[2]]},
            "exclude of query 0 names document 2, but the ids are 0 to 1",
        ),
    ],
    ids=str,
)
def test_errors(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rf.band_topk(torch.zeros(1, 8), torch.zeros(9, 8), 3, **change)


def test_a_gpu_leaves_groups_to_the_cpu() -> None:
    """CPU tensors stand for those on the GPU."""
    errors.warn_once.cache_clear()
    groups = torch.arange(0, 301, 3)
    queries, docs = unit_rows(9, 24, 0), unit_rows(300, 24, 1)
    rule = module.Rule(8, 0.1, 0.5, 5, None, None, None, False, 0, False, False, groups)
    with pytest.warns(RefineFastWarning, match="on the CPU: only the CPU's kernel takes groups"):
        found = module._search_on_gpu(queries, docs, rule)
    gold = reference.band_topk(queries, docs, 8, band=(0.1, 0.5), groups=groups)
    assert_same(rf.BandTopK(*found), gold)
    errors.warn_once.cache_clear()
