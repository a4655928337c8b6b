"""What exports share: where they go, the product, and a sentence for a missing package."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import RefineFastError
from ...files import as_argument, real_path
from ..artifacts import DEV, HELD_OUT, MODEL
from ..config_file import saved_config
from ..corpus.jsonl import read_records
from ..encoder.load import load_encoder
from ..queries.query import Query
from ..reporting.loss import Loss

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

STDOUT = "-"
"""The target of an export that is printed."""

EXPORTS = "export"
"""Folder in the run folder where exports go by default."""


def target_path(
    run: Path,
    format: str,
    suffix: str,
    target: str | None,
    *,
    overwrite: bool,
    own: Collection[str] | None = None,
) -> Path:
    """Checks where an export goes.

    Args:
        run: the run folder.
        format: name of the format, and of the export in the run folder.
        suffix: of the format's file; empty: the format is a folder.
        target: what was given as --out; None: in the run folder.
        overwrite: whether to replace an earlier export.
        own: the names that a folder of this format holds. One with other names is not replaced.
            None: only the default folder is replaced.

    Raises:
        RefineFastError: if nothing may be written there.
    """
    is_folder = not suffix
    if target == STDOUT:
        raise RefineFastError(
            f"--out: {format} cannot be written to stdout; give a "
            f"{'folder' if is_folder else 'file'}."
        )
    default = run / EXPORTS / f"{format}{suffix}"
    path = default if target is None else Path(os.path.abspath(Path(target).expanduser()))
    if target is not None:
        _check_place(run, target, real_path(path))
    if path.suffix != suffix and not is_folder:
        raise RefineFastError(
            f"--out must end in {suffix} for the format {format} (got {target!r}); rename it."
        )
    if not os.path.lexists(path) or (is_folder and path.is_dir() and not any(path.iterdir())):
        return path
    if path.is_dir() != is_folder or (is_folder and path.is_symlink()):
        raise RefineFastError(
            f"--out: {path} exists and is not a {'folder' if is_folder else 'file'}; give another."
        )
    replaceable = not is_folder or own is not None or path == default
    if not (overwrite and replaceable):
        remedy = "give another" + (", or add --overwrite" if replaceable else "")
        raise RefineFastError(f"--out: {path} exists; {remedy}.")
    known = None if not is_folder or own is None else set(own)
    if known is not None and (other := {item.name for item in path.iterdir()} - known):
        raise RefineFastError(
            f"--out: {path} holds other files too, such as {min(other)}, and would be deleted; "
            "give another."
        )
    return path


def _check_place(run: Path, target: str, real: Path) -> None:
    folder = run.resolve()
    if real.is_relative_to(folder) and not real.is_relative_to(folder / EXPORTS):
        raise RefineFastError(
            f"--out: {target} is inside the run folder; give a path outside of it, or omit --out."
        )
    docs = _documents(run)
    if docs is not None and real.is_relative_to(docs):
        raise RefineFastError(
            f"--out: {target} is inside the documents' folder {docs}, so the next run would "
            "read it as a document; give another path."
        )


def _documents(run: Path) -> Path | None:
    """The folder of the run's documents; None if it is gone, or if they are Python's own."""
    docs = saved_config(run).docs
    return None if docs is None else docs.resolve()


def held_out_queries(run: Path) -> list[Query]:
    """The queries of a run that it did not train on, by which an export states its loss."""
    return [query for name in (DEV, HELD_OUT) for query in read_records(run / name, Query)]


def loss_sentence(loss: Loss | None) -> str:
    """A loss in words; None: it could not be measured."""
    unknown = "the loss of recall is not known: the run has no held-out queries"
    return unknown if loss is None else str(loss)


def load_product(run: Path) -> SentenceTransformer:
    """The encoder that a run has made, on the device that encoders run on.

    Raises:
        RefineFastError: if the run has none.
    """
    if not (run / MODEL).is_dir():
        raise RefineFastError(
            f"export: {run} has no {MODEL}; finish the run first: "
            f"refine-fast run --out {as_argument(run)}."
        )
    return load_encoder(run / MODEL, trust_remote_code=saved_config(run).trust_remote_code)


@contextmanager
def naming_extras(format: str, extras: Mapping[str, str]) -> Iterator[None]:
    """Turns the ModuleNotFoundError of a package into a sentence that names its extra.

    Args:
        format: that is written.
        extras: package -> extra.

    Raises:
        RefineFastError: in place of the error.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in extras:
            raise
        raise RefineFastError(
            f"export: {format} needs the package {package}; "
            f"pip install 'refine-fast[{extras[package]}]'."
        ) from None
