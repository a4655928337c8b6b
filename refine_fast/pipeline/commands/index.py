"""``refine-fast index``: a faiss index of a run's documents, for serving."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...errors import RefineFastError
from ..artifacts import CHUNKS, MODEL
from ..config import load_config
from ..console import Console
from ..engine import RunFolder, Stage
from ..stages import index as stage


def index(out: Path, console: Console) -> None:
    """Writes the index of the finished run ``out`` unless it is up to date.

    Raises:
        RefineFastError: if the run is not finished.
    """
    files = {name: out / name for name in (MODEL, CHUNKS)}
    for name, path in files.items():
        if not path.exists():
            raise RefineFastError(
                f"index: {out} has no {name}; finish the run first: refine-fast run --out {out}."
            )
    trusted = load_config(None, {"out": out}).trust_remote_code
    work = partial(stage.run, out, console, trust_remote_code=trusted)
    indexing = Stage("index", (stage.INDEX,), work, files, module=stage.__name__)
    with RunFolder(out) as folder:
        if reasons := folder.reasons(indexing):
            console.say(f"index: {'; '.join(reasons)}")
            folder.do(indexing)
    console.result({"index": str(out / stage.INDEX)})
    console.say(f"the index is {out / stage.INDEX}")
