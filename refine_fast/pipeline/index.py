"""A faiss index of a run's documents under its fused model: what a server loads beside the model."""

from __future__ import annotations

from pathlib import Path

from ..errors import RefineFastError
from ..integrations.faiss import write_index
from . import embed
from .chunks import Chunk
from .console import Console
from .embed import encode
from .encoder import load_encoder
from .jsonl import read_records
from .stages import RunFolder, Stage, write_json


def index(folder: Path, console: Console) -> None:
    """Writes FOLDER/index/: ``vectors.faiss``, an exact inner-product index of unit vectors (cosine), and ``ids.json``, the chunk id of
    each row. Done again only when the model or the chunks have changed."""
    for name in ("model", "chunks.jsonl"):
        if not (folder / name).exists():
            raise RefineFastError(f"index: {folder} has no {name}; finish the run first with refine-fast run --out {folder}.")

    def build(to: Path) -> None:
        chunks = read_records(folder / "chunks.jsonl", Chunk)
        with console.progress("embedding chunks") as progress:
            vectors = encode(load_encoder(folder / "model"), [chunk.passage for chunk in chunks], role="document", progress=progress)
        (to / "index").mkdir(exist_ok=True)
        write_index(vectors, to / "index" / "vectors.faiss")
        write_json(to / "index" / "ids.json", [chunk.id for chunk in chunks])

    files = {"model": folder / "model", "chunks.jsonl": folder / "chunks.jsonl"}
    stage = Stage("index", ("index",), build, files, code=(embed,))
    with RunFolder(folder) as run:
        if reasons := run.reasons(stage):
            console.say(f"index: {'; '.join(reasons)}")
            run.do(stage)
    console.result({"index": str(folder / "index")})
    console.say(f"the index is {folder / 'index'}")
