"""Near duplicates of earlier texts: MinHash bands, a shuffle of their keys, exact comparisons.

Three steps, each in shards where there are workers:

1. Sketch: a text becomes the keys of its MinHash bands (Broder 1997; Leskovec et al., Mining of
   Massive Datasets, section 3.4).
2. Shuffle: the keys of one band, of all texts, are brought together and sorted. Texts with one key
   share a bucket, and only texts that share a bucket are compared. Texts that are connected through
   buckets are a family.
3. Compare: every family is resolved in the order of its texts, each against those that were kept.

No pair of different families is compared, so families are resolved anywhere, in any order. Within a
family a text is compared with kept texts only: a bucket of m pages from one template costs m
comparisons if they are near duplicates, not m^2 / 2, and crosses the network as m entries. The
price: one process resolves a whole family, so a family is as slow as it is without workers.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..progress import Progress
from ..reserve import reserve, save_rows
from ..workers import SharedRows, Spread, Work

Shingles = Callable[[str], set[str]]
"""The set of parts by which a text is compared."""

PERMUTATIONS = 128
"""Hash values of a sketch."""
TEXTS_PER_SHARD = 10_000
"""Texts that are sketched in one shard, and the least that are compared in one."""
REMEMBERED = 1000
"""Kept texts whose shingles are in memory; those of a corpus need gigabytes."""


@dataclass(frozen=True)
class _Rule:
    """When two texts are near duplicates, and how the candidates are found."""

    shingles: Shingles
    threshold: float
    bands: int
    rows: int
    """Hash values of a band."""


def near_duplicate_mask(
    texts: Sequence[str],
    shingles: Shingles,
    threshold: float,
    *,
    progress: Progress | None = None,
    spread: Spread | None = None,
) -> np.ndarray:
    """Marks the texts that are near duplicates of an earlier, unmarked text.

    Two texts are near duplicates if the Jaccard similarity ``len(A & B) / len(A | B)`` of their
    shingle sets is at least ``threshold``. MinHash (``datasketch``) proposes candidates, and the
    sets decide.

    Memory in this process: 128 bytes for each text at threshold 0.8 (16 bands), on disk where there
    are workers, and a few hundred for each text that shares a bucket.

    Args:
        texts: n texts, in order of preference.
        shingles: a function of a module if there are workers.
        threshold: see above.
        progress: called with (sketched texts, n).
        spread: the workers; None: this process.

    Returns:
        (n,) bool.
    """
    from datasketch import MinHashLSH

    mask = np.zeros(len(texts), bool)
    if not len(texts):
        return mask
    # A lower threshold for candidates than for the decision: at equal ones the index would
    # miss every other pair near it.
    index = MinHashLSH(threshold=max(threshold - 0.15, 0.1), num_perm=PERMUTATIONS)
    rule = _Rule(shingles, threshold, index.b, index.r)
    if spread is None:
        keys = _band_keys(texts, rule, progress)
        buckets = [_shared_buckets(band) for band in keys.T]
    else:
        buckets = _buckets_in_shards(spread, texts, rule, progress)
    families = _Families.of(buckets, len(texts))
    if spread is None:
        found = np.array(_repeats([texts[i] for i in families.texts], families.buckets, rule), bool)
    else:
        found = _repeats_in_shards(spread, texts, families, rule)
    mask[families.texts] = found
    return mask


def _band_keys(texts: Sequence[str], rule: _Rule, progress: Progress | None = None) -> np.ndarray:
    """(n, bands) uint64: texts are candidates if they agree in one column."""
    from datasketch import MinHash

    sets = ([part.encode() for part in rule.shingles(text)] for text in texts)
    keys = np.empty((len(texts), rule.bands), "<u8")
    for i, sketch in enumerate(MinHash.generator(sets, num_perm=PERMUTATIONS)):
        bands = sketch.hashvalues[: rule.bands * rule.rows].reshape(rule.bands, rule.rows)
        hashed = (hashlib.blake2b(band.tobytes(), digest_size=8).digest() for band in bands)
        keys[i] = np.frombuffer(b"".join(hashed), "<u8")
        if progress is not None:
            progress(i + 1, len(texts))
    return keys


def _shared_buckets(keys: np.ndarray) -> np.ndarray:
    """The buckets of one band that hold two texts or more.

    Args:
        keys: (n,) uint64, of every text.

    Returns:
        (2, m) int64: a text, and the number of its bucket, below n.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    number = np.concatenate([[0], np.cumsum(ordered[1:] != ordered[:-1])])
    shared = np.bincount(number)[number] > 1
    return np.stack([order[shared], number[shared]])


@dataclass(frozen=True)
class _Families:
    """The texts that share a bucket with another, by family and in order within each."""

    texts: np.ndarray
    """(m,) int64: numbers of texts."""
    buckets: list[list[int]]
    """Of each of them: the buckets that it is in, numbered across bands."""
    starts: np.ndarray
    """Where in ``texts`` each family starts."""

    @classmethod
    def of(cls, buckets: Sequence[np.ndarray], n: int) -> _Families:
        """Connects the texts through the buckets of each band.

        Args:
            buckets: per band what ``_shared_buckets`` returns.
            n: how many texts there are.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        text, of_text = np.unique(
            np.concatenate([members for members, _ in buckets]), return_inverse=True
        )
        bucket, of_bucket = np.unique(
            np.concatenate([number + n * band for band, (_, number) in enumerate(buckets)]),
            return_inverse=True,
        )
        nodes = len(text) + len(bucket)
        links = of_text, of_bucket + len(text)
        graph = coo_array((np.ones(len(of_text), bool), links), shape=(nodes, nodes))
        family = connected_components(graph, directed=False)[1][: len(text)]
        order = np.argsort(family, kind="stable")
        ends = np.cumsum(np.bincount(of_text, minlength=len(text)))
        entries = np.split(of_bucket[np.argsort(of_text, kind="stable")], ends[:-1])
        starts = np.flatnonzero(np.diff(family[order], prepend=-1))
        return cls(text[order], [entries[i].tolist() for i in order], starts)

    def shards(self) -> list[slice]:
        """Runs of whole families with at least ``TEXTS_PER_SHARD`` texts, but for the last."""
        cuts = [0]
        for end in (*self.starts[1:].tolist(), len(self.texts)):
            if end - cuts[-1] >= TEXTS_PER_SHARD:
                cuts.append(end)
        if cuts[-1] < len(self.texts):
            cuts.append(len(self.texts))
        return [slice(*span) for span in pairwise(cuts)]


def _repeats(texts: Sequence[str], buckets: Sequence[Sequence[int]], rule: _Rule) -> list[bool]:
    """Per text, in order: whether it is a near duplicate of an earlier one that is not. ``buckets``
    has those of each text; texts that share none are not compared."""
    kept_in: defaultdict[int, list[int]] = defaultdict(list)
    shingles_of = lru_cache(REMEMBERED)(lambda j: rule.shingles(texts[j]))
    found: list[bool] = []
    for i, (text, own_buckets) in enumerate(zip(texts, buckets, strict=True)):
        earlier = {j for bucket in own_buckets for j in kept_in.get(bucket, ())}
        own = rule.shingles(text) if earlier else set()
        repeats = any(_jaccard(own, shingles_of(j)) >= rule.threshold for j in earlier)
        if not repeats:
            for bucket in own_buckets:
                kept_in[bucket].append(i)
        found.append(repeats)
    return found


def _jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b)


def _key(rule: _Rule) -> list[object]:
    """What a shard depends on besides its item, as JSON."""
    name = getattr(rule.shingles, "__qualname__", None)
    return [name, rule.threshold, rule.bands, rule.rows, PERMUTATIONS]


def _buckets_in_shards(
    spread: Spread, texts: Sequence[str], rule: _Rule, progress: Progress | None
) -> list[np.ndarray]:
    """The shared buckets of each band: texts are sketched in shards, this process writes their keys
    band by band, and one shard sorts the keys of a band."""
    size, done = TEXTS_PER_SHARD, 0
    path = spread.folder / "bands.npy"
    spread.folder.mkdir(parents=True, exist_ok=True)
    keys = reserve(path, "<u8", (rule.bands, len(texts)))
    shards = spread.workers.map(
        spread.folder / "sketch",
        _key(rule),
        partial(_sketcher, rule),
        -(-len(texts) // size),
        lambda i: list(texts[i * size : (i + 1) * size]),
    )
    for i, shard in shards:
        part = np.load(shard)
        keys[:, i * size : i * size + len(part)] = part.T
        done += len(part)
        if progress is not None:
            progress(done, len(texts))
    keys.flush()
    bands = [(band, band + 1) for band in range(rule.bands)]
    sorted_bands = spread.workers.map(
        spread.folder / "shuffle",
        hashlib.sha256(keys.data).hexdigest(),
        partial(_sorter, spread.workers.share_rows(spread.folder, keys, bands)),
        rule.bands,
        lambda i: i,
    )
    buckets = {i: np.load(shard) for i, shard in sorted_bands}
    return [buckets[i] for i in range(rule.bands)]


def _repeats_in_shards(
    spread: Spread, texts: Sequence[str], families: _Families, rule: _Rule
) -> np.ndarray:
    """``_repeats`` of every family, in shards of whole families."""
    spans = families.shards()
    found = np.zeros(len(families.texts), bool)
    shards = spread.workers.map(
        spread.folder / "compare",
        _key(rule),
        partial(_comparer, rule),
        len(spans),
        lambda i: [[texts[j] for j in families.texts[spans[i]]], families.buckets[spans[i]]],
    )
    for i, shard in shards:
        found[spans[i]] = json.loads(shard.read_text())
    return found


def _sketcher(rule: _Rule) -> Work:
    def work(item: list[str], path: Path) -> None:
        save_rows(path, _band_keys(item, rule))

    return work


def _sorter(bands: SharedRows) -> Work:
    def work(item: int, path: Path) -> None:
        save_rows(path, _shared_buckets(bands.read(item, item + 1)[0]))

    return work


def _comparer(rule: _Rule) -> Work:
    def work(item: tuple[list[str], list[list[int]]], path: Path) -> None:
        path.write_text(json.dumps(_repeats(*item, rule)))

    return work
