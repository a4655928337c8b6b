"""In which order chunks are asked about, so that whatever prefix the budget pays for covers the corpus."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ..chunks import Chunk


def spread(chunks: list[Chunk], *, seed: int, embeddings: np.ndarray | None = None) -> list[int]:
    """Indices of all chunks: in turn one chunk of each cluster, and within a cluster one of each document.

    ``embeddings`` (n, d): the chunks are put in sqrt(n) clusters of k-means; without them the documents alone spread the sample.
    """
    rng = np.random.default_rng(seed)
    clusters = np.zeros(len(chunks), dtype=np.int64) if embeddings is None else _clusters(embeddings, seed)
    shuffled = rng.permutation(len(chunks)).tolist()
    turn_in_document: dict[tuple[int, str], int] = {}
    turns = []
    for i in shuffled:
        own = (int(clusters[i]), chunks[i].source)
        turns.append(turn_in_document.get(own, 0))
        turn_in_document[own] = turns[-1] + 1
    by_cluster: dict[int, list[int]] = {}
    for _, i in sorted(zip(turns, shuffled, strict=True), key=lambda pair: pair[0]):  # stable: the shuffle breaks ties
        by_cluster.setdefault(int(clusters[i]), []).append(i)
    rounds = sorted(((rank, order, i) for order, own in enumerate(by_cluster.values()) for rank, i in enumerate(own)))
    return [i for _, _, i in rounds]


def _clusters(embeddings: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    count = max(1, math.isqrt(len(embeddings)))
    return MiniBatchKMeans(count, random_state=seed, n_init=1, batch_size=4096).fit_predict(embeddings)
