"""index: a faiss index of the chunks under the fused encoder. Not part of a run: on request."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...files import write_json
from ...integrations.faiss import write_index
from ..artifacts import CHUNKS, MODEL
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records
from ..encoder.encode import encode
from ..encoder.load import load_encoder

if TYPE_CHECKING:
    from ..console import Console

INDEX = "index"
"""Folder: ``vectors.faiss`` and ``ids.json``."""


def run(out: Path, console: Console, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Writes ``vectors.faiss``, an exact inner-product index in the encoder's own similarity, and
    ``ids.json``, the chunk id of each of its rows."""
    chunks = read_records(out / CHUNKS, Chunk)
    passages = [chunk.passage for chunk in chunks]
    model = load_encoder(out / MODEL, trust_remote_code=trust_remote_code)
    with console.progress("embedding chunks") as progress:
        vectors = encode(model, passages, role="document", progress=progress)
    (folder / INDEX).mkdir(exist_ok=True)
    write_index(vectors, folder / INDEX / "vectors.faiss")
    write_json(folder / INDEX / "ids.json", [chunk.id for chunk in chunks])
