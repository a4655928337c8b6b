"""band_topk beside faiss, torch and sentence-transformers.

The vectors are clustered so that the band is populated for every query and, for some, lies beyond
rank 2,048: more than a top-k index returns. faiss's top k therefore does less than is asked, and
its range_search cannot take the k best.

faiss-cpu multiplies with OpenBLAS, which picks the widest instructions of the CPU: forcing our
level to avx2 on a machine with AVX-512 does not slow faiss down. The drop-in cannot be faster than
its search: its peer spends nine tenths of its time in faiss's.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import refine_fast as rf

from ..operation import DTYPES, Contender, Operation, Shape, Work

BAND = (0.5, 0.7)
CENTRES = 600
NEGATIVES = 10
"""Of the drop-in."""


@dataclass
class Search:
    """The inputs: queries (B, D), docs (N, D), and what is asked."""

    queries: Tensor
    docs: Any
    k: int
    skip: int
    index: Any = None
    """faiss's, once it is built."""


def clustered(count: int, width: int, seed: int) -> Tensor:
    """(count, width) unit rows around 600 centres of very different sizes, each row at its own
    distance."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(CENTRES, width, generator=generator), dim=1)
    generator.manual_seed(seed)
    sizes = torch.arange(1, CENTRES + 1).float().pow(-0.9)
    centre = centres[torch.multinomial(sizes, count, replacement=True, generator=generator)]
    distance = 0.3 + 0.8 * torch.rand(count, 1, generator=generator)
    noise = torch.randn(count, width, generator=generator) / width**0.5
    return torch.nn.functional.normalize(centre + distance * noise, dim=1)


@contextmanager
def in_memory(shape: Shape, dtype: str, device: str) -> Iterator[Search]:
    """Clustered queries and documents."""
    B, N, D, k, skip = (int(shape[name]) for name in ("B", "N", "D", "k", "skip"))
    queries, docs = (
        clustered(n, D, seed).to(device, DTYPES[dtype]) for n, seed in ((B, 1), (N, 2))
    )
    yield Search(queries, docs, k, skip)


@contextmanager
def mapped(shape: Shape, dtype: str, device: str) -> Iterator[Search]:
    """The documents in a memory map of float32."""
    B, N, D, k, skip = (int(shape[name]) for name in ("B", "N", "D", "k", "skip"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "docs.npy"
        file = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(N, D))
        for begin in range(0, N, 100_000):
            rows = min(100_000, N - begin)
            file[begin : begin + rows] = clustered(rows, D, begin + 2).numpy()
        del file
        yield Search(clustered(B, D, 1), np.load(path, mmap_mode="r"), k, skip)


def ours(search: Search) -> Tensor:
    """One call."""
    found = rf.band_topk(search.queries, search.docs, search.k, band=BAND, skip=search.skip)
    return found.scores


@torch.no_grad()
def torch_chunks(search: Search) -> Tensor:
    """The ten lines that one would write: a chunk's scores, the skipped and what is outside the
    band masked, topk."""
    found = []
    with warnings.catch_warnings():  # of a memory map that cannot be written to
        warnings.simplefilter("ignore", UserWarning)
        docs = torch.as_tensor(search.docs)
    for chunk in search.queries.split(256):
        s = (chunk @ docs.T).float()
        s.scatter_(1, s.topk(search.skip).indices, -1)
        s.masked_fill_((s < BAND[0]) | (s > BAND[1]), -1)
        found.append(s.topk(min(search.k, s.shape[1])).values)
    return torch.cat(found)


def _faiss_index(search: Search) -> Any:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    if search.index is None:
        search.index = faiss.IndexFlatIP(search.docs.shape[1])
        search.index.add(np.asarray(search.docs))
    return search.index


def faiss_top(search: Search) -> object:
    """The k most similar, whatever the band."""
    return _faiss_index(search).search(search.queries.numpy(), search.k)


def faiss_range(search: Search) -> object:
    """All documents at or above the lower edge of the band."""
    return _faiss_index(search).range_search(search.queries.numpy(), BAND[0])


class Encoded:
    """What sentence-transformers' mine_hard_negatives asks of a model; the embeddings are there
    already, and it only hands them out."""

    device = "cpu"

    def __init__(self, search: Search) -> None:
        """Keeps the embeddings."""
        self.search = search

    def encode_query(self, _: list[str], **__: object) -> np.ndarray:
        """The queries."""
        return self.search.queries.numpy()

    def encode_document(self, _: list[str], **__: object) -> np.ndarray:
        """The documents."""
        return np.asarray(self.search.docs)

    def get_embedding_dimension(self) -> int:
        """Their width."""
        return self.search.docs.shape[1]

    def similarity(self, a: np.ndarray, b: Tensor) -> Tensor:
        """Inner products."""
        return torch.as_tensor(a) @ b.T

    def similarity_pairwise(self, a: np.ndarray, b: Tensor) -> Tensor:
        """Inner products, row by row."""
        return (torch.as_tensor(a) * torch.as_tensor(b)).sum(-1)


def drop_in(search: Search, mine: Callable[..., Any]) -> int:
    """Mines ten negatives a query, document i being the positive of query i; the number of rows
    found."""
    from datasets import Dataset

    names = range(len(search.queries))
    pairs = Dataset.from_dict(
        {"anchor": [f"q{i}" for i in names], "positive": [f"d{i}" for i in names]}
    )
    rule = {
        "max_score": BAND[1],
        "min_score": BAND[0],
        "range_min": search.skip,
        "num_negatives": NEGATIVES,
        "output_format": "n-tuple",
    }
    corpus = [f"d{i}" for i in range(len(search.docs))]
    return len(mine(pairs, Encoded(search), corpus=corpus, verbose=False, **rule))


def their_drop_in(search: Search, **options: Any) -> int:
    """sentence-transformers' own function."""
    from sentence_transformers.util import mine_hard_negatives

    return drop_in(search, functools.partial(mine_hard_negatives, **options))


def our_drop_in(search: Search) -> int:
    """Ours with its signature."""
    from refine_fast.integrations.sentence_transformers import mine_hard_negatives

    embeddings = (search.queries, search.docs)
    return drop_in(search, functools.partial(mine_hard_negatives, embeddings=embeddings))


def work(shape: Shape, dtype: str) -> Work:
    """2 B N D: the scores. Queries and documents are read once, ids and scores written."""
    B, N, D, k = (shape[name] for name in ("B", "N", "D", "k"))
    return Work(2 * B * N * D, (B + N) * D * DTYPES[dtype].itemsize + 12 * B * k)


SHAPE = {"B": 4096, "N": 200_000, "D": 384, "k": 100, "skip": 5}
QUICK = {"B": 1024, "N": 20_000}
TINY = {"B": 40, "N": 400, "D": 32, "k": 7}

OPERATIONS = (
    Operation(
        "band_topk",
        "mine",
        shape=SHAPE,
        quick=QUICK,
        tiny=TINY,
        full=(
            {"D": 768},
            {"N": 20_000},
            {"N": 50_000},
            {"N": 100_000},
            {"B": 512},
            {"B": 1024},
            {"B": 2048},
            {"N": 20_000, "D": 128},
            {"N": 20_000, "D": 1024},
        ),
        check={"B": 768, "N": 20_000, "k": 5, "skip": 0},
        check_peer="torch_chunks",
        dtypes=("fp32", "bf16", "fp16"),
        contenders=(
            Contender("refine_fast", ours, "exact, no B x N matrix"),
            Contender("torch_chunks", torch_chunks, "ten lines of torch, 256 queries at a time"),
            Contender(
                "faiss_top100",
                faiss_top,
                "IndexFlatIP's k most similar; it cannot answer the band",
                needs="faiss",
                devices=("cpu",),
                exact=False,
                dtypes=("fp32",),
            ),
            Contender(
                "faiss_range",
                faiss_range,
                "range_search at the lower edge; it cannot take the k best",
                needs="faiss",
                devices=("cpu",),
                exact=False,
                dtypes=("fp32",),
            ),
        ),
        peer="faiss_top100",
        inputs=in_memory,
        work=work,
        result=lambda scores: torch.nan_to_num(scores.float(), nan=-1.0),
    ),
    Operation(
        "band_topk",
        "mmap",
        shape=SHAPE,
        quick=QUICK,
        tiny=TINY,
        full=({"N": 5_000_000},),
        contenders=(
            Contender("refine_fast", ours, "from a memory map", devices=("cpu",)),
            Contender("torch_chunks", torch_chunks, "from a memory map", devices=("cpu",)),
        ),
        peer="torch_chunks",
        inputs=mapped,
        work=work,
        result=lambda scores: torch.nan_to_num(scores.float(), nan=-1.0),
        by_default=False,
    ),
    Operation(
        "band_topk",
        "drop_in",
        shape=SHAPE,
        quick=QUICK,
        tiny={**TINY, "N": 4000},
        rounds=1,
        contenders=(
            Contender(
                "refine_fast",
                our_drop_in,
                "its mine_hard_negatives",
                needs="sentence-transformers",
                devices=("cpu",),
            ),
            Contender(
                "sentence_transformers_faiss",
                lambda search: their_drop_in(search, use_faiss=True),
                "mine_hard_negatives over faiss; it finds fewer rows",
                needs="faiss",
                devices=("cpu",),
                exact=False,
            ),
            Contender(
                "sentence_transformers",
                their_drop_in,
                "mine_hard_negatives over torch; it finds fewer rows",
                needs="sentence-transformers",
                devices=("cpu",),
                exact=False,
            ),
        ),
        peer="sentence_transformers_faiss",
        inputs=in_memory,
        work=work,
        result=lambda rows: torch.tensor(float(rows)),
        by_default=False,
    ),
)
