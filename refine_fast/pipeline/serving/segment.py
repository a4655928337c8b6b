"""A segment of an index: passages that were encoded together, in files that never change.

passages.arrow            a row per passage: the fields of its Chunk
spans.npy, offsets.npy    where each sentence is in its passage's text; each passage's sentences
product.npy, base.npy     (N, d) passages under the product and, if it differs, the base
sentences.npy             (S, d) sentences under the product, each with its title in front
<vectors>.faiss           a faiss index of them, unless they are few
postings/                 BM25
moments.npz               of product.npy and base.npy
segment.json              counts, kinds of index and their recall, bytes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from ...files import read_json, write_json
from ..corpus.chunk import Chunk
from ..corpus.sentences import Spans, sentence_texts
from ..corpus.text import whole_characters
from ..reserve import save_rows
from . import ann
from .dense import Moments
from .lexical import Postings
from .storage import readable

BATCH_ROWS = 1024
"""Passages of a record batch. The file is not compressed, so that a passage is read in its place:
a group of a parquet file would be decompressed and copied for each one that is found."""

PASSAGES = "passages.arrow"

Encode = Callable[[str, Sequence[str], Path], None]
"""Writes the vectors "product", "base" or "sentences" of texts to a .npy file."""


def write_segment(
    folder: Path, chunks: Sequence[Chunk], spans: Sequence[Spans], encode: Encode, *, base: bool
) -> None:
    """Writes passages and their sentences into a segment, all but ``finish_segment``.

    Args:
        folder: an empty folder.
        chunks: at least one.
        spans: of each chunk the sentences.
        encode: makes the vectors.
        base: whether the base encoder is another one than the product.
    """
    import pyarrow as pa

    names = [field.name for field in fields(Chunk)]
    numbers = ("start", "end")
    schema = pa.schema([(n, pa.int64() if n in numbers else pa.string()) for n in names])
    with pa.ipc.new_file(str(folder / PASSAGES), schema) as file:
        for first in range(0, len(chunks), BATCH_ROWS):
            part = chunks[first : first + BATCH_ROWS]
            columns = {name: [getattr(chunk, name) for chunk in part] for name in names}
            for name in set(names).difference(numbers):
                columns[name] = list(map(whole_characters, columns[name]))
            file.write_batch(pa.record_batch(columns, schema=schema))
    flat = [span for own in spans for span in own]
    save_rows(folder / "spans.npy", np.array(flat, np.int32).reshape(-1, 2))
    save_rows(folder / "offsets.npy", np.cumsum([0, *map(len, spans)], dtype=np.int64))
    passages = [chunk.passage for chunk in chunks]
    encode("product", passages, folder / "product.npy")
    encode("sentences", sentence_texts(chunks, spans), folder / "sentences.npy")
    if base:
        encode("base", passages, folder / "base.npy")
    Postings.of(passages).save(folder / "postings")


def finish_segment(
    folder: Path, kind: ann.Kind | None = None, queries: np.ndarray | None = None
) -> dict[str, Any]:
    """Adds the faiss indexes and the facts to a segment that has its texts and vectors.

    Args:
        folder: of the segment.
        kind: of every faiss index that has enough vectors for it; None: by their number.
        queries: (Q, d) of the product, to measure the recall with; None: vectors of the segment.

    Returns:
        What segment.json says.
    """
    facts: dict[str, Any] = {"indexes": {}}
    for name in ("product", "base", "sentences"):
        path = folder / f"{name}.npy"
        if not path.exists():
            continue
        vectors = np.load(path, mmap_mode="r").view(np.ndarray)
        facts[name] = len(vectors)
        own_kind = ann.kind_for(len(vectors), kind)
        about: dict[str, Any] = {"kind": own_kind, "recall@10": 1.0}
        if own_kind != "flat":
            index = ann.build(vectors, own_kind)
            ann.save(index, folder / f"{name}.faiss")
            rng = np.random.default_rng(0)
            asked = vectors[np.sort(rng.permutation(len(vectors))[: ann.SAMPLE])]
            if queries is not None and len(queries) and name != "base":
                asked = queries[: ann.SAMPLE]
            about["recall@10"] = round(ann.recall(index, vectors, asked), 4)
            about["bytes"] = (folder / f"{name}.faiss").stat().st_size
        facts["indexes"][name] = about
        if name != "sentences":
            found = Moments.of(vectors)
            save_rows(folder / f"moments-{name}.npy", np.vstack([found.total, found.second]))
    facts["bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    write_json(folder / "segment.json", facts)
    return facts


class Segment:
    """A segment, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Maps the files of a segment.

        Raises:
            RefineFastError: if one of them is damaged or missing.
        """
        import pyarrow as pa

        self.folder = folder
        with readable(folder):
            self.facts: dict[str, Any] = read_json(folder / "segment.json")
            if not isinstance(self.facts, dict):
                raise ValueError("segment.json is missing or no JSON object")
            self.offsets = np.load(folder / "offsets.npy")
            self.spans = self._array("spans")
            self.vectors: dict[str, np.ndarray] = {
                name: self._array(name)
                for name in ("product", "base", "sentences")
                if name in self.facts
            }
            self.moments = {
                side: self._moments_of(side) for side in self.vectors.keys() - {"sentences"}
            }
            self.postings = Postings.load(folder / "postings")
            self.indexes = {
                name: ann.load(folder / f"{name}.faiss")
                for name, about in self.facts["indexes"].items()
                if about["kind"] != "flat"
            }
            self._passages = pa.ipc.open_file(pa.memory_map(str(folder / PASSAGES)))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r").view(np.ndarray)

    def _moments_of(self, side: str) -> Moments:
        total, *second = np.load(self.folder / f"moments-{side}.npy")
        return Moments(len(self), total, np.array(second))

    def column(self, name: str) -> list[Any]:
        """One field of the chunk of every passage."""
        with readable(self.folder):
            values: list[Any] = self._passages.read_all().column(name).to_pylist()
        return values

    def sentences(self, row: int) -> Spans:
        """Where the sentences of a passage are in its text."""
        first, last = self.offsets[row : row + 2]
        return [(int(start), int(end)) for start, end in self.spans[first:last]]

    def chunk(self, row: int) -> Chunk:
        """One passage."""
        number, place = divmod(row, BATCH_ROWS)
        with readable(self.folder):
            batch = self._passages.get_batch(number)
            names = batch.schema.names
            values = [column[place].as_py() for column in batch.columns]
        return Chunk(**dict(zip(names, values, strict=True)))
