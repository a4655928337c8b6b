"""Documents: files in a folder, tables, a BEIR folder, a saved dataset, or Python's own docs."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ...errors import RefineFastError, RefineFastWarning
from ...files import as_argument, name_of, real_path, walk
from ..progress import Progress
from ..workers import Spread
from .beir import beir_file
from .chunk import document_id
from .columns import SAMPLE_ROWS, STANDARD_IDS, Columns, Fields, RowReader
from .extraction import Extracted, extract_in_shards
from .formats import files, tables
from .formats.content import Content, Markup, Unreadable
from .jsonl import read_jsonl, text_field
from .python_docs import python_docs

SUFFIXES = (*files.SUFFIXES, *tables.SUFFIXES)
"""Suffixes of the files that are read."""


@dataclass(frozen=True)
class Document:
    """One document, decoded.

    id: unique; a file's path relative to the folder, a row's own id. source: where to find it,
    "file" or "file:row", relative to what the user gave; no two documents share it. text: the
    decoded characters (line ends as in the file; HTML, PDF and the like: the extracted text); every
    offset counts in it. markup: where it may be cut (``formats.content``); a retrieval set judges a
    "passage" whole.
    """

    id: str
    title: str
    text: str
    source: str
    markup: Markup = "text"


@dataclass(frozen=True)
class Reading:
    """How to read what the documents do not say themselves.

    encoding: of text files and tables; None: find it. columns: of tables. exclude: files and
    folders that are no documents, although they lie in the folder. root: a folder, or one file in a
    folder, that the names of files are relative to where the documents are in it or around it;
    None: what is read. say: told in one line what was guessed. known: ids of earlier documents, and
    of their chunks, with the source of each: a row whose id a row of its file has had keeps it, and
    none in ``root`` or around it gets one that another file still has.
    """

    encoding: str | None = None
    columns: Columns = field(default_factory=Columns)
    exclude: Sequence[Path] = ()
    root: Path | None = None
    say: Callable[[str], None] | None = None
    known: Mapping[str, str] = field(default_factory=dict)


def load_documents(
    path: Path | None,
    progress: Progress | None = None,
    *,
    reading: Reading | None = None,
    spread: Spread | None = None,
) -> list[Document]:
    """The documents at ``path``, in a fixed order.

    - None: Python's own documentation (``python_docs``);
    - a folder: its files of SUFFIXES at any depth, links followed, hidden files and folders left
      out; or one such file;
    - a BEIR folder (corpus.jsonl[.gz]): its passages;
    - a folder that ``datasets.Dataset.save_to_disk`` wrote.

    A table gives one document a row. What cannot be read, is empty or binary is named in a
    RefineFastWarning and skipped.

    Args:
        path: a folder, a file or None.
        progress: counts files.
        reading: how to read it.
        spread: the workers that find the text in the PDF, Word, PowerPoint and HTML files of a
            folder; None: this process. The documents are the same.

    Raises:
        RefineFastError: if nothing is left, for a malformed row (file, line, field), or for a
            folder with a BEIR folder below it.
    """
    if path is None:
        return [Document(*entry) for entry in python_docs()]
    if not path.exists():
        raise RefineFastError(
            f"{path} does not exist; give a folder, a file or a dataset, or nothing for Python's "
            "own documentation."
        )
    reading = Reading() if reading is None else reading
    if path.is_file():
        documents = _single_file(path, reading)
    elif corpus := beir_corpus(path):
        _warn_of_others(corpus)
        documents = _passages(corpus)
    elif _is_dataset(path):
        documents = _dataset(path, reading)
    else:
        documents = _folder(path, reading, progress, spread)
    if not documents:
        raise RefineFastError(
            f"{path} holds no usable text; give a folder of {', '.join(SUFFIXES)} files, one such "
            "file or a BEIR folder."
        )
    return documents


def may_be_read(path: Path) -> Callable[[Path], bool]:
    """Which files under ``path`` ``load_documents`` looks into: in a folder of files of any kind,
    those of SUFFIXES."""
    if not path.is_dir() or beir_corpus(path) or _is_dataset(path):
        return lambda file: True
    return lambda file: _suffix(file) is not None


def _is_dataset(folder: Path) -> bool:
    return (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists()


def beir_corpus(folder: Path) -> Path | None:
    """The file of the passages if the folder is in BEIR layout."""
    return beir_file(folder, "corpus")


def _warn_of_others(corpus: Path) -> None:
    """Warns of documents that lie in a BEIR folder and are none of its files."""
    own = ("corpus.jsonl", "queries.jsonl", "qrels/", "README")
    others = [
        name for file, name in walk(corpus.parent) if _suffix(file) and not name.startswith(own)
    ]
    if others:
        message = (
            f"{corpus.parent} holds {corpus.name}, so it is read as a BEIR folder, and other files "
            f"there ({len(others):,}, such as {others[0]}) are not; move these or that to a folder "
            "of its own."
        )
        warnings.warn(message, RefineFastWarning, stacklevel=3)


def _closed(error: OSError) -> None:
    message = f"{error.filename} is skipped: {error.strerror}; check the folder's permissions."
    warnings.warn(message, RefineFastWarning, stacklevel=2)


def _single_file(path: Path, reading: Reading) -> list[Document]:
    if _suffix(path) is None:
        raise RefineFastError(
            f"{path} is of a kind that is not read; give a file of {', '.join(SUFFIXES)}."
        )
    named = _Named(path, reading)
    try:
        read = partial(files.read_file, encoding=reading.encoding)
        named.add(path, path.name, read)
    except Unreadable as reason:
        raise RefineFastError(f"{path} cannot be read: {reason}.") from None
    named.warn()
    return list(named.documents.values())


def _place(path: Path, root: Path | None) -> tuple[Path, Path] | None:
    """The folders of ``root`` and of ``path``, by names that show where one is from the other; None
    if neither is in the other."""
    if root is not None:
        for real in (os.path.abspath, os.path.realpath):  # either may be given by way of a link
            given, around = Path(real(path)), Path(real(root))
            if given.is_relative_to(around) or around.is_relative_to(given):
                return _folder_of(around), _folder_of(given)
    return None


def _folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


class _Named:
    """The documents of a file or of the files in a folder, each under an id of its own."""

    def __init__(self, path: Path, reading: Reading) -> None:
        place = _place(path, reading.root)
        self.documents: dict[str, Document] = {}
        self._root, self._folder = (_folder_of(path),) * 2 if place is None else place
        self._with_root = place is not None
        self._reading = reading
        self._repeated: list[str] = []
        self._renamed: list[str] = []
        self._ids: dict[str, set[str] | None] = {}
        self._replacing: list[str] = []

    def add(self, path: Path, name: str, read: Callable[[Path], Content]) -> None:
        """Reads a file, called ``name`` in the folder: the rows of its tables, or what ``read``
        gives.

        Raises:
            Unreadable: if the file cannot be read.
            RefineFastError: for a malformed row of a table.
        """
        name = name_of(os.path.relpath(self._folder / name, self._root))
        if tables.table_suffix(path) is None:
            content = read(path)
            own = Document(name, content.title, content.text, name, content.markup)
            self._add(name, name, [own])
            return

        for table, found in _tables(path, name, self._root, self._reading):
            self._add(name, table, found)

    def _add(self, file: str, table: str, found: Sequence[Document]) -> None:
        own = {document.id for document in found}
        for document in found:
            id, where = document.id, str(self._root / document.source)
            earlier = self.documents.get(id)
            if earlier and document == replace(earlier, source=document.source):
                self._repeated.append(where)
                continue
            while (
                id in self.documents
                or self._is_anothers(id, file, table)
                or (id != document.id and id in own)  # a row without an id has "table:number"
            ):
                id = f"{table}:{id}"
            if id != document.id:
                self._renamed.append(f'{where}, now "{id}"')
            elif not _is_of(there := self._reading.known.get(id, file), file):
                self._replacing.append(f"{where} that of {there}")
            self.documents[id] = replace(document, id=id)

    def _is_anothers(self, id: str, file: str, table: str) -> bool:
        """Whether an id is that of an earlier document of another table, and not to be replaced."""
        known = self._reading.known
        there = known.get(id)
        if there is None or _is_of(there, table):
            return False
        return _is_of(known.get(f"{table}:{id}", ""), table) or (
            self._with_root and not _is_of(there, file) and self._is_still_in(there, id)
        )

    def _is_still_in(self, source: str, id: str) -> bool:
        """Whether a document, or the chunk of one, is still in the file of its source: those of a
        renamed one, and rows that moved to another, are to be replaced."""
        ends = [place for place, mark in enumerate(f"{source}:") if mark == ":"]
        name = next((source[:end] for end in ends if (self._root / source[:end]).is_file()), None)
        if name is None:
            return False
        if name not in self._ids:
            self._ids[name] = self._ids_in(name)
        ids = self._ids[name]
        return ids is None or not ids.isdisjoint([id, document_id(id)])

    def _ids_in(self, name: str) -> set[str] | None:
        """The ids in a table; None: it is none, or cannot be read."""
        path, quiet = self._root / name, replace(self._reading, say=None)
        if tables.table_suffix(path) is None:
            return None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are shown when the file itself is added
                found = _tables(path, name, self._root, quiet)
        except (Unreadable, RefineFastError):
            return None
        return {document.id for _, documents in found for document in documents}

    def warn(self) -> None:
        """Names what was left out or renamed."""
        _warn_of_skipped(self._repeated, "they repeat a row of another file or sheet")
        if self._renamed:
            warnings.warn(
                f"{len(self._renamed)} documents have the id of another file's document, or of "
                "another sheet's; the name of theirs is put before it, the first at "
                f"{self._renamed[0]}.",
                RefineFastWarning,
                stacklevel=4,
            )
        if self._replacing and self._reading.say is not None:
            self._reading.say(
                f"{len(self._replacing)} documents replace those with the same id of other files, "
                f"the first {self._replacing[0]}; give them other ids to keep both"
            )


def _tables(
    path: Path, name: str, root: Path, reading: Reading
) -> list[tuple[str, list[Document]]]:
    """The name of each table in a file, which is called ``name`` in ``root``, and its documents."""

    def documents(title: str, rows: tables.Rows) -> list[Document]:
        placed = ((f"{table_name(title)}:{place}", row) for place, row in rows)
        return _guessed(placed, root, reading)

    def table_name(title: str) -> str:
        return f"{name}:{title}" if title else name

    found = tables.read_each(path, reading.encoding, documents)
    return [(table_name(title), rows) for title, rows in found]


def _is_of(source: str, table: str) -> bool:
    """Whether the source of a document lies in a file, or in a sheet of one."""
    return source == table or source.startswith(f"{table}:")


def _folder(
    folder: Path, reading: Reading, progress: Progress | None, spread: Spread | None
) -> list[Document]:
    named = _Named(folder, reading)
    other: Counter[str] = Counter()
    excluded = {real_path(path) for path in reading.exclude}

    def is_document(path: Path) -> bool:
        real = real_path(path)
        return excluded.isdisjoint([real, *real.parents])

    paths = [(path, name) for path, name in walk(folder, _closed) if is_document(path)]
    _refuse_retrieval_set(folder, [path for path, _ in paths])
    extracted: dict[Path, Extracted] = {}
    wanted = [path for path, _ in paths if path.suffix.lower() in files.EXTRACTED]
    if spread is not None and wanted:
        extracted = extract_in_shards(spread, wanted, reading.encoding, progress)

    def read(path: Path) -> Content:
        found = extracted.pop(path, None)
        return files.read_file(path, reading.encoding) if found is None else found.get()

    for number, (path, name) in enumerate(paths):
        if progress is not None:
            progress(number, len(paths))
        if _suffix(path) is None:
            other[path.suffix.lower() or "no suffix"] += 1
            continue
        try:
            named.add(path, name, read)
        except (Unreadable, RefineFastError) as reason:
            message = f"{path} is skipped: {str(reason).removesuffix('.')}."
            warnings.warn(message, RefineFastWarning, stacklevel=3)
    named.warn()
    if other:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in other.most_common(5))
        warnings.warn(
            f"{other.total()} files are skipped by their suffix ({kinds}); only "
            f"{', '.join(SUFFIXES)} are read.",
            RefineFastWarning,
            stacklevel=3,
        )
    return list(named.documents.values())


def _refuse_retrieval_set(folder: Path, paths: Iterable[Path]) -> None:
    """Raises RefineFastError if there is a BEIR folder below ``folder``: its queries would become
    documents among the passages that answer them."""
    queries = (path for path in paths if beir_file(path.parent, "queries") == path)
    corpus = next(filter(None, (beir_corpus(path.parent) for path in queries)), None)
    if corpus is not None:
        raise RefineFastError(
            f"{folder} is no BEIR folder but holds one, {corpus.parent}, whose queries would be "
            f"read as documents; give {as_argument(corpus.parent)} instead, or move it elsewhere."
        )


def _suffix(path: Path) -> str | None:
    """The suffix by which the file is read; None if it is not."""
    suffix = path.suffix.lower()
    return suffix if suffix in files.SUFFIXES else tables.table_suffix(path)


def _dataset(path: Path, reading: Reading) -> list[Document]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # pyarrow, json and datasets each raise their own
        raise RefineFastError(
            f"{path} looks like a dataset on disk but cannot be loaded ({error}); save it again."
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if len(data) != 1:
            raise RefineFastError(
                f"{path} holds the splits {sorted(data)}; give the folder of one, such as "
                f"{path / sorted(data)[0]}."
            )
        data = next(iter(data.values()))
    rows = ((f"{path.name}:{number}", row) for number, row in enumerate(data, 1))
    return _guessed(rows, path.parent, reading)


def _guessed(
    rows: Iterator[tuple[str, dict[str, Any]]], folder: Path, reading: Reading
) -> list[Document]:
    """Documents of rows whose columns may have any names."""
    sample = list(islice(rows, SAMPLE_ROWS))
    if not sample:
        return []
    reader = RowReader(
        [row for _, row in sample], reading.columns, str(folder / sample[0][0]), reading.say
    )
    return _documents(chain(sample, rows), folder, reader.read, "text")


def _passages(corpus: Path) -> list[Document]:
    def read(row: dict[str, Any], where: str) -> Fields:
        return Fields(
            text_field(row, ("text",), where),
            text_field(row, ("title",), where, default=""),
            text_field(row, STANDARD_IDS, where, default=""),
        )

    rows = ((f"{corpus.name}:{number}", row) for number, row in read_jsonl(corpus))
    return _documents(rows, corpus.parent, read, "passage")


def _documents(
    rows: Iterable[tuple[str, dict[str, Any]]],
    folder: Path,
    read: Callable[[dict[str, Any], str], Fields],
    markup: Markup,
) -> list[Document]:
    """One document a row; ``source`` ("file:row") serves as the id of a row without one."""
    documents: list[Document] = []
    first: dict[str, Document] = {}
    blank, repeated = [], []
    for source, row in rows:
        where = str(folder / source)
        fields = read(row, where)
        document = Document(fields.id or source, fields.title, fields.text, source, markup)
        if not fields.text.strip():
            blank.append(where)
            continue
        earlier = first.setdefault(document.id, document)
        if earlier is document:
            documents.append(document)
        elif replace(document, source=earlier.source) == earlier:
            repeated.append(where)
        else:
            raise RefineFastError(
                f'{where}: the id "{document.id}" was used before, at {earlier.source}; give every '
                "document its own."
            )
    _warn_of_skipped(blank, "their text is empty")
    _warn_of_skipped(repeated, "they repeat an earlier row")
    return documents


def _warn_of_skipped(places: Sequence[str], reason: str) -> None:
    if places:
        message = f"{len(places)} documents are skipped because {reason}, the first at {places[0]}."
        warnings.warn(message, RefineFastWarning, stacklevel=4)
