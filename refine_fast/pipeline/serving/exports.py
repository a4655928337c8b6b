"""The passages of an index and their vectors, in the formats of what people serve with.

    vectors   a parquet file: the fields of each passage and its vector
    faiss     a folder: vectors.faiss, an exact index by inner product, and ids.json, its rows' ids
    lancedb   a folder: a LanceDB database with the table "passages"
    qdrant    a folder: a Qdrant collection "passages" in the client's local mode

The vectors are the product's, float32; the inner product is its similarity. The parquet file may
hold smaller ones (``CompactVectors``).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_json
from ...integrations.faiss import write_index
from ..corpus.chunk import Chunk
from .compact import CompactVectors
from .search import Index

BATCH = 1000
"""Passages that are written at a time."""

TABLE = "passages"

METADATA = "refine_fast"
"""Key of the parquet file's metadata that holds the facts of ``CompactVectors``, as JSON."""

Batches = Iterator[tuple[list[Chunk], np.ndarray]]


def batches(index: Index) -> Batches:
    """The live passages with their (n, d) vectors, in order."""
    for segment, start in zip(index.segments, index.starts, strict=False):
        live = np.flatnonzero(index.alive[start : start + len(segment)])
        for first in range(0, len(live), BATCH):
            rows = live[first : first + BATCH]
            yield [segment.chunk(int(row)) for row in rows], segment.vectors["product"][rows]


def ids_and_vectors(index: Index) -> tuple[list[str], np.ndarray]:
    """The ids of ``batches``, and all (n, d) vectors; no text is read."""
    ids = [id for id, alive in zip(index.column("id"), index.alive, strict=True) if alive]
    vectors = [
        segment.vectors["product"][index.alive[start : start + len(segment)]]
        for segment, start in zip(index.segments, index.starts, strict=False)
    ]
    return ids, np.concatenate(vectors)


def write_vectors(path: Path, index: Index, compact: CompactVectors | None = None) -> None:
    """Writes the parquet file. If the vectors are compact, its metadata say how."""
    from pyarrow import parquet

    writer = None
    try:
        for chunks, vectors in batches(index):
            table = _table(chunks, vectors if compact is None else compact.stored(vectors))
            if compact is not None:
                table = table.replace_schema_metadata({METADATA: json.dumps(compact.facts())})
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _table(chunks: list[Chunk], vectors: np.ndarray) -> Any:
    import pyarrow as pa

    d = vectors.shape[1]
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), d)
    return pa.Table.from_pylist([asdict(chunk) for chunk in chunks]).append_column("vector", column)


def write_faiss(folder: Path, index: Index) -> None:
    """Writes the faiss index and the ids of its rows."""
    ids, vectors = ids_and_vectors(index)
    write_index(vectors, folder / "vectors.faiss")
    write_json(folder / "ids.json", ids)


def write_lancedb(folder: Path, index: Index) -> None:
    """Writes the LanceDB database."""
    import lancedb

    database = lancedb.connect(str(folder))
    table = None
    for chunks, vectors in batches(index):
        rows = _table(chunks, vectors)
        if table is None:
            table = database.create_table(TABLE, rows)
        else:
            table.add(rows)


def write_qdrant(folder: Path, index: Index) -> None:
    """Writes the Qdrant collection. A point's id is a UUID made from the passage's id."""
    from qdrant_client import QdrantClient, models

    client = QdrantClient(path=str(folder))
    try:
        d = index.segments[0].vectors["product"].shape[1]
        similarity = models.VectorParams(size=d, distance=models.Distance.DOT)
        client.create_collection(TABLE, vectors_config=similarity)
        for chunks, vectors in batches(index):
            client.upsert(
                TABLE,
                [
                    models.PointStruct(
                        id=str(uuid.uuid5(uuid.NAMESPACE_URL, chunk.id)),
                        vector=vector.tolist(),
                        payload=asdict(chunk),
                    )
                    for chunk, vector in zip(chunks, vectors, strict=True)
                ],
            )
    finally:
        client.close()


WRITERS: dict[str, Callable[[Path, Index], None]] = {
    "vectors": write_vectors,
    "faiss": write_faiss,
    "lancedb": write_lancedb,
    "qdrant": write_qdrant,
}

EXTRAS = {"lancedb": "lancedb", "qdrant_client": "qdrant"}
"""Package -> the extra that installs it."""
