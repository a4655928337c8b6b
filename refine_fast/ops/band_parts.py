"""``band_topk`` in shards: each searches some of the documents, and a merge gives the result of one
search of all of them, to the last bit.

A document's score is a float64 sum in a fixed order, the same on every device and ISA level
(csrc/core/band_topk.h), so shards may be searched on different machines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import atomic
from ..reference import hash64
from .band_inputs import (
    Excluded,
    Kept,
    Progress,
    check,
    checked_offsets,
    integer,
    ranges,
    shape,
)
from .band_topk import BandTopK, rule_of, search

MERGED = 1 << 20
"""Entries of two parts that are merged at a time, of some 100 bytes each."""


class BandRule(NamedTuple):
    """The arguments that all parts of one search share."""

    k: int
    band: tuple[float, float]
    skip: int
    select: str
    seed: int
    order: str
    normalize: bool


class BandPart(NamedTuple):
    """What ``band_topk`` of B queries would choose from, if these documents were all.

    Of M documents at most min(M, k + skip) per query are kept, so a part takes at most
    16 (k + skip) bytes per query, with ``select="random"`` 16 (k + 2 skip).
    """

    rule: BandRule
    spans: tuple[tuple[int, int], ...]
    """(begin, end) of the ids that were searched, ascending."""
    ids: Tensor
    """(B, K) int64: the K = k + skip most similar documents in the band, most similar first, ties
    by lower id; -1 beyond the last. With ``select="random"``, K = skip."""
    scores: Tensor
    """(B, K) float64; NaN beyond the last."""
    drawn_ids: Tensor
    """(B, R) int64: with ``select="random"`` the R = k + skip documents in the band with the
    smallest ``reference.hash64``, smallest first; else R = 0."""
    drawn_scores: Tensor
    """(B, R) float64."""
    above: Tensor
    """(B,) int64: documents above the band, at most ``skip``; 0 under "band_then_skip"."""
    in_band: Tensor
    """(B,) int64: documents in the band, before any is skipped."""

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, all of it or nothing."""
        from safetensors.torch import save

        about = {"rule": self.rule._asdict(), "spans": self.spans}
        tensors = {
            name: x.cpu().contiguous() for name, x in zip(self._fields[2:], self[2:], strict=True)
        }
        with atomic(Path(path)) as temporary:
            temporary.write_bytes(save(tensors, {"band_part": json.dumps(about)}))

    @classmethod
    def load(cls, path: str | Path) -> BandPart:
        """Reads what ``save`` wrote, onto the CPU.

        Raises:
            ValueError: a file without a part.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["band_part"])
                tensors = [file.get_tensor(name) for name in cls._fields[2:]]
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} holds no part; give a file that BandPart.save wrote"
            ) from error
        rule = BandRule(**{**about["rule"], "band": tuple(about["rule"]["band"])})
        return cls(rule, tuple((begin, end) for begin, end in about["spans"]), *tensors)


def band_topk_part(
    queries: Any,
    docs: Any,
    k: int,
    *,
    id_offset: int = 0,
    band: tuple[float, float] = (0.5, 0.7),
    skip: int = 5,
    exclude: Sequence[Any] | None = None,
    ceiling: Any = None,
    select: str = "hardest",
    seed: int = 0,
    order: str = "skip_then_band",
    normalize: bool = False,
    groups: Any = None,
    progress: Progress | None = None,
) -> BandPart:
    """One shard of ``band_topk``: of a search of all documents, the part over some of them.

    ``merge_band_topk`` then gives ``band_topk(queries, all_docs, k, ...)``, bit for bit::

        parts = [
            rf.band_topk_part(queries, all_docs[a:b], k, id_offset=a, ...) for a, b in shards
        ]
        ids, scores, in_band = rf.merge_band_topk(parts)

    Args:
        queries: (B, D), all of them in every shard, in the same order.
        docs: (M, D), documents ``id_offset`` to ``id_offset + M - 1``; M may be 0. With ``groups``,
            the rows of M documents.
        k: documents per query of the merged result.
        id_offset: the id of the first row of ``docs`` among all documents.
        exclude: per query ids among all documents; those of other shards are ignored.
        groups: (M + 1,) offsets of this shard's documents in its ``docs``, as for ``band_topk``.
        band, skip, ceiling, select, seed, order, normalize, progress: as for ``band_topk``, the
            same in every shard.

    Returns:
        The part, on the queries' device.

    Raises:
        ValueError, TypeError, torch.OutOfMemoryError: as ``band_topk``; an unusable row is named by
            its id among all documents. ValueError: id_offset or an excluded id below 0.
    """
    rows, count = shape(queries, "queries")[0], shape(docs, "docs")[0]
    id_offset = integer(id_offset, "id_offset")
    ends = None
    if groups is not None:
        ends = torch.from_numpy(checked_offsets(groups, count, "groups", "docs"))
        count = len(ends) - 1
    end = id_offset + count
    if id_offset < 0 or end >= 2**63:
        raise ValueError(
            f"id_offset must be an integer from 0 to {2**63 - 1 - count}, so that the ids of the"
            f" {count} documents are int64 (got {id_offset})"
        )
    excluded = None if exclude is None else Excluded.of(exclude, rows)
    if excluded is not None:
        excluded.check(None)
        excluded = excluded.within(id_offset, end)
    asked = rule_of(k, band, skip, excluded, ceiling, select, seed, order, normalize)
    check(queries, docs, asked)
    # no more are found than there are documents
    clipped = asked._replace(k=min(asked.k, count), skip=min(asked.skip, count), groups=ends)
    kept = search(queries, docs, clipped, progress, id_offset, Kept)
    rule = BandRule(
        asked.k, (asked.lo, asked.hi), asked.skip, select, asked.seed, order, asked.normalize
    )
    return BandPart(rule, ((id_offset, end),) if count else (), *kept)


def merge_band_parts(parts: Iterable[BandPart]) -> BandPart:
    """The part that one ``band_topk_part`` over the documents of all parts would give.

    Associative and commutative: parts may be merged in any order, as a tree or one by one, from a
    generator too. Takes the memory of two parts and of the result.

    Args:
        parts: at least one, of the same queries and rule, over different documents.

    Returns:
        The part, on the device of the first.

    Raises:
        ValueError: no part; parts of another rule or number of queries; a document in two parts.
    """
    merged: BandPart | None = None
    for part in parts:
        merged = part if merged is None else _merge(merged, part)
    if merged is None:
        raise ValueError("parts is empty; give at least one part")
    return merged


def merge_band_topk(parts: Iterable[BandPart]) -> BandTopK:
    """The ids, scores and counts of one ``band_topk`` over the documents of all parts.

    Exact for every ``select``, ``order``, ``exclude``, ``ceiling`` and ``skip``. The documents
    above the band rank before those in it, so of the ``skip`` most similar documents the first are
    those above, and the rest lead the most similar in the band.

    Args:
        parts: from ``band_topk_part``, ``merge_band_parts`` or ``BandPart.load``; a list or a
            generator, in any order.

    Returns:
        BandTopK(ids, scores, in_band) on the device of the first part.

    Raises:
        ValueError: as ``merge_band_parts``.
    """
    part = merge_band_parts(parts)
    rule, device = part.rule, part.ids.device
    skipped = rule.skip - part.above  # of those in the band; `above` is 0 under band_then_skip
    in_band = (part.in_band - skipped).clamp(min=0)
    places = torch.arange(rule.k, device=device)
    if rule.select == "hardest":
        from_place = skipped[:, None] + places
        ids, scores = _at(part.ids, part.scores, from_place)
    else:
        # the last that is skipped, and -inf where none is
        last = (skipped.clamp(max=part.ids.shape[1]).minimum(part.in_band) - 1)[:, None]
        last_id, last_score = _at(part.ids, part.scores, last)
        worse = (part.drawn_scores < last_score) | (
            (part.drawn_scores == last_score) & (part.drawn_ids > last_id)
        )
        free = (worse | (last < 0)) & (part.drawn_ids >= 0)
        first = torch.sort((~free).byte(), dim=1, stable=True).indices[:, : rule.k]
        drawn_ids = part.drawn_ids.where(free, -1).gather(1, first)
        drawn_scores = part.drawn_scores.where(free, torch.nan).gather(1, first)
        ids, scores = _at(*_most_similar(drawn_ids, drawn_scores), places.expand(len(in_band), -1))
    return BandTopK(ids, scores.float(), in_band)


def _merge(a: BandPart, b: BandPart) -> BandPart:
    for name, ours, theirs in zip(BandRule._fields, a.rule, b.rule, strict=True):
        if ours != theirs:
            raise ValueError(f"the parts differ in {name}: {ours!r} and {theirs!r}")
    rows = len(a.ids)
    if len(b.ids) != rows:
        raise ValueError(f"the parts are of {rows} and of {len(b.ids)} queries")
    spans: list[tuple[int, int]] = []
    for begin, end in sorted(a.spans + b.spans):
        if spans and begin < spans[-1][1]:
            raise ValueError(
                f"document {begin} is in two parts; give each shard its id_offset, and each part"
                " once"
            )
        if spans and begin == spans[-1][1]:
            begin = spans.pop()[0]
        spans.append((begin, end))
    rule, device = a.rule, a.ids.device
    random = rule.select == "random"
    wide = max(1, sum(x.shape[1] for part in (a, b) for x in (part.ids, part.drawn_ids)))
    count = sum(end - begin for begin, end in spans)
    skip = min(rule.skip, count)
    room = skip if random else min(rule.k, count) + skip
    drawn_room = min(rule.k, count) + skip
    blocks: list[tuple[Tensor, ...]] = []
    for begin, end in ranges(rows, max(1, MERGED // wide)):
        lists = [
            torch.cat([x[begin:end].to(device) for x in both], dim=1)
            for both in zip(a[2:6], b[2:6], strict=True)
        ]
        ids, scores = _most_similar(lists[0], lists[1])
        queries = torch.arange(begin, end, device=device)[:, None]
        drawn_ids, drawn_scores = _smallest_hash(lists[2], lists[3], rule.seed, queries)
        blocks.append(
            (
                ids[:, :room], scores[:, :room],
                drawn_ids[:, :drawn_room], drawn_scores[:, :drawn_room],
            )
        )  # fmt: skip
    if not blocks:
        return a._replace(spans=tuple(spans))
    ids, scores, drawn_ids, drawn_scores = (torch.cat(x) for x in zip(*blocks, strict=True))
    above = (a.above + b.above.to(device)).clamp(max=rule.skip)
    in_band = a.in_band + b.in_band.to(device)
    return BandPart(
        rule, tuple(spans), ids, scores, drawn_ids, drawn_scores, above, in_band
    )  # fmt: skip


def _by_id(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Each row by ascending id, what is unused last."""
    order = ids.where(ids >= 0, torch.iinfo(torch.int64).max).sort(dim=1).indices
    return ids.gather(1, order), scores.gather(1, order)


def _most_similar(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Each row most similar first, ties by lower id, what is unused last."""
    ids, scores = _by_id(ids, scores)
    key = (scores + 0.0).where(ids >= 0, -torch.inf)  # -0 and 0 tie
    order = key.sort(dim=1, descending=True, stable=True).indices
    return ids.gather(1, order), scores.gather(1, order)


def _smallest_hash(
    ids: Tensor, scores: Tensor, seed: int, queries: Tensor
) -> tuple[Tensor, Tensor]:
    """Each row smallest hash first, what is unused last. queries: (rows, 1)."""
    ids, scores = _by_id(ids, scores)
    key = hash64(seed, queries, ids).where(ids >= 0, torch.iinfo(torch.int64).max)
    order = key.sort(dim=1, stable=True).indices
    return ids.gather(1, order), scores.gather(1, order)


def _at(ids: Tensor, scores: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The entries at the places (rows, n) of each row; -1 and NaN outside."""
    width = ids.shape[1]
    ids = torch.nn.functional.pad(ids, (0, 1), value=-1)
    scores = torch.nn.functional.pad(scores, (0, 1), value=torch.nan)
    places = places.where((places >= 0) & (places < width), width)
    return ids.gather(1, places), scores.gather(1, places)
