"""The order of the chunks: whatever prefix the budget pays for covers the corpus."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ...corpus.chunk import Chunk


def spread(chunks: list[Chunk], *, seed: int, embeddings: np.ndarray | None = None) -> list[int]:
    """Indices of all chunks, every prefix spread over clusters and documents.

    Clusters take turns; each gives a chunk of its document with the fewest chunks drawn so far.

    Args:
        chunks: n chunks.
        seed: seed of the order within documents and of the clusters.
        embeddings: (n, d), to form sqrt(n) clusters by k-means; without them, the documents alone
            spread the order.
    """
    clusters = (
        np.zeros(len(chunks), dtype=np.int64) if embeddings is None else _clusters(embeddings, seed)
    )
    shuffled = np.random.default_rng(seed).permutation(len(chunks)).tolist()
    # cluster -> document -> its chunks, the next one last
    waiting: dict[int, dict[str, list[int]]] = {}
    for i in reversed(shuffled):
        waiting.setdefault(int(clusters[i]), {}).setdefault(chunks[i].source, []).append(i)
    # Per cluster, its documents by the number of chunks drawn from them. A count that other
    # clusters have raised is corrected when it reaches the top.
    heaps = {
        cluster: [(0, own[-1], name) for name, own in documents.items()]
        for cluster, documents in waiting.items()
    }
    for heap in heaps.values():
        heapq.heapify(heap)
    drawn: Counter[str] = Counter()
    order = []
    while heaps:
        for cluster, heap in list(heaps.items()):
            while heap[0][0] < drawn[heap[0][2]]:
                heapq.heapreplace(heap, (drawn[heap[0][2]], *heap[0][1:]))
            name = heap[0][2]
            own = waiting[cluster][name]
            order.append(own.pop())
            drawn[name] += 1
            if own:
                heapq.heapreplace(heap, (drawn[name], own[-1], name))
            else:
                heapq.heappop(heap)
            if not heap:
                del heaps[cluster]
    return order


def _clusters(embeddings: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.cluster import MiniBatchKMeans

    count = max(1, math.isqrt(len(embeddings)))
    return MiniBatchKMeans(count, random_state=seed, n_init=1, batch_size=4096).fit_predict(
        embeddings
    )
