"""``refine-fast export --format vectors|faiss|lancedb|qdrant``: the index, to serve elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import RefineFastError
from ...files import atomic, atomic_folder
from ..console import Console
from ..serving import exports
from ..serving.search import Index
from ..serving.storage import IndexFolder
from .export import EXPORTS

SUFFIX = {"vectors": ".parquet"}
"""Format -> suffix of its file; the others are folders."""


def export_index(
    out: Path, format: str, target: str | None, console: Console, *, overwrite: bool = False
) -> None:
    """Writes the passages of a run's index and their vectors.

    Args:
        out: the run folder, with an index.
        format: one of ``exports.WRITERS``.
        target: where it goes; None: in the run folder.
        console: told what was written.
        overwrite: whether to replace an earlier export.

    Raises:
        RefineFastError: no index, a missing package, or a target that cannot be written.
    """
    folder = IndexFolder(out)
    manifest = folder.manifest()
    if manifest is None:
        raise RefineFastError(f"export: {out} has no index; make one: refine-fast index {out}.")
    suffix = SUFFIX.get(format, "")
    default = out / EXPORTS / f"{format}{suffix}"
    path = default if target is None else Path(os.path.abspath(Path(target).expanduser()))
    if path.suffix != suffix and suffix:
        raise RefineFastError(
            f"--out must end in {suffix} for the format {format} (got {target!r}); rename it."
        )
    if os.path.lexists(path) and not (overwrite and path == default):
        remedy = "give another" + ("" if path != default else ", or add --overwrite")
        raise RefineFastError(f"--out: {path} exists; {remedy}.")
    index = Index.open(folder, manifest)
    path.parent.mkdir(parents=True, exist_ok=True)
    with (atomic if suffix else atomic_folder)(path) as temporary:
        exports.write(format, temporary, index)
    console.result({"export": str(path), "format": format, "passages": index.count})
    console.say(f"{index.count:,} passages with their vectors are in {path}")
