"""Documents in: a folder of files, a JSON lines file, a BEIR folder, a Hugging Face dataset on disk, or Python's own documentation."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import RefineFastError, RefineFastWarning
from ...files import name_of, walk
from ..progress import Progress
from .file_formats import SUFFIXES, Markup, Unreadable, read_file
from .jsonl import read_jsonl, text_field
from .python_docs import python_docs


@dataclass(frozen=True)
class Document:
    """One document, decoded.

    id: unique; a file's path relative to the folder, a row's own id. source: where to find it, "file" or "file:line", relative to what the
    user gave; no two documents share it. text: the decoded characters (line ends as in the file; HTML and PDF: the extracted text); every
    offset counts in it. markup: where it may be cut: "text" at sentences, "markdown" at headings too, "passage" nowhere (a retrieval set
    judges it whole).
    """

    id: str
    title: str
    text: str
    source: str
    markup: Markup = "text"


def load_documents(path: Path | None, progress: Progress | None = None) -> list[Document]:
    """The documents at ``path``, in a fixed order:

    - None: Python's own documentation (``python_docs``);
    - a folder: its .txt, .md, .html and .pdf files at any depth, links followed, hidden files and folders left out; or one such file;
    - a .jsonl or .jsonl.gz file of {"text", "title" (optional), "_id" | "id" | "doc_id" (optional)};
    - a BEIR folder (corpus.jsonl[.gz]): its passages;
    - a folder that ``datasets.Dataset.save_to_disk`` wrote, with the fields of JSON lines.

    What cannot be read, is empty or binary is named in a RefineFastWarning and skipped. Raises RefineFastError where nothing is left, and
    for a malformed row: file, line, field. ``progress`` counts files.
    """
    if path is None:
        return [Document(*entry) for entry in python_docs()]
    if not path.exists():
        raise RefineFastError(
            f"{path} does not exist; give a folder, a file or a dataset, or nothing for Python's own documentation."
        )
    if path.is_file():
        documents = (
            _jsonl(path, "text")
            if path.name.endswith((".jsonl", ".jsonl.gz"))
            else _files([(path, name_of(path.name))], progress)
        )
    elif corpus := next(
        (
            file
            for suffix in (".jsonl", ".jsonl.gz")
            if (file := path / f"corpus{suffix}").is_file()
        ),
        None,
    ):
        documents = _jsonl(corpus, "passage")
    elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        documents = _dataset(path)
    else:
        documents = _files(list(walk(path, _closed)), progress)
    if not documents:
        raise RefineFastError(
            f"{path} holds no usable text; give a folder of {', '.join(SUFFIXES)} files, a JSONL file or a BEIR folder."
        )
    return documents


def _closed(error: OSError) -> None:
    message = f"{error.filename} is skipped: {error.strerror}; check the folder's permissions."
    warnings.warn(message, RefineFastWarning, stacklevel=2)


def _files(paths: Sequence[tuple[Path, str]], progress: Progress | None) -> list[Document]:
    documents = []
    other: Counter[str] = Counter()
    for number, (path, name) in enumerate(paths):
        if progress is not None:
            progress(number, len(paths))
        if path.suffix.lower() not in SUFFIXES:
            other[path.suffix.lower() or "no suffix"] += 1
            continue
        try:
            content = read_file(path)
        except Unreadable as reason:
            warnings.warn(f"{path} is skipped: {reason}.", RefineFastWarning, stacklevel=3)
            continue
        documents.append(Document(name, content.title, content.text, name, content.markup))
    if other:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in other.most_common(5))
        warnings.warn(
            f"{other.total()} files are skipped by their suffix ({kinds}); only {', '.join(SUFFIXES)} are read.",
            RefineFastWarning,
            stacklevel=3,
        )
    return documents


def _jsonl(path: Path, markup: Markup) -> list[Document]:
    return _rows(
        ((f"{path.name}:{number}", row) for number, row in read_jsonl(path)), path.parent, markup
    )


def _dataset(path: Path) -> list[Document]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow, json and datasets each raise their own
        raise RefineFastError(
            f"{path} looks like a dataset on disk but cannot be loaded ({error}); save it anew."
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if len(data) != 1:
            raise RefineFastError(
                f"{path} holds the splits {sorted(data)}; give the folder of one, such as {path / sorted(data)[0]}."
            )
        data = next(iter(data.values()))
    return _rows(
        ((f"{path.name}:{number}", row) for number, row in enumerate(data, 1)), path.parent, "text"
    )


def _rows(
    rows: Iterable[tuple[str, dict[str, Any]]], folder: Path, markup: Markup
) -> list[Document]:
    """One document a row; ``source`` ("file:line") serves as the id of a row without one."""
    documents: list[Document] = []
    first: dict[str, str] = {}
    blank = []
    for source, row in rows:
        where = str(folder / source)
        text = text_field(row, ("text",), where)
        title = text_field(row, ("title",), where, default="")
        id = text_field(row, ("_id", "id", "doc_id"), where, default=source)
        if first.setdefault(id, source) != source:
            raise RefineFastError(
                f'{where}: the id "{id}" was used before, at {first[id]}; give every document its own.'
            )
        if not text.strip():
            blank.append(where)
            continue
        documents.append(Document(id, title, text, source, markup))
    if blank:
        message = f"{len(blank)} documents are skipped because their text is empty, the first at {blank[0]}."
        warnings.warn(message, RefineFastWarning, stacklevel=4)
    return documents
