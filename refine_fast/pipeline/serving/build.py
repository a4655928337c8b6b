"""Builds an index, and adds, changes and removes documents without building it anew."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import RefineFastError
from ..corpus.chunk import Chunk, document_id
from ..corpus.sentences import split_passages
from ..progress import Progress
from ..queries.query import Query
from ..reserve import reserve
from .ann import Kind
from .blend import BlendChoice, Choosing, choose_blend
from .dense import TILE_ROWS, rows_of_groups
from .encoders import Encoders, Side
from .judged import Texts
from .search import Index
from .segment import Segment, finish_segment, write_segment
from .storage import IndexFolder, Manifest
from .systems import choose

Bar = Callable[[str], AbstractContextManager[Progress]]
"""Opens a progress bar with the given label."""


@dataclass(frozen=True)
class Builder:
    """Writes the index of a run. The caller holds the lock of the run folder."""

    folder: IndexFolder
    encoders: Encoders
    progress: Bar
    say: Callable[[str], None]
    """Told what became of documents."""

    def build(
        self,
        chunks: Sequence[Chunk],
        held_out: Callable[[Texts], Sequence[Query]],
        key: dict[str, Any],
        kind: Kind | None = None,
    ) -> Manifest:
        """A new index of the run's chunks, with the documents that were added to the old one and
        without those that were removed from it. Where the run's version of such a document is
        another one than at that time, it counts again.

        Args:
            chunks: of the run.
            held_out: gives the queries that choose the blend of an index with these texts.
            key: what the index is made from.
            kind: of the faiss indexes; None: by size.

        Raises:
            RefineFastError: if no passage is left.
        """
        old = self.folder.manifest()
        self.folder.sweep(old)
        before = old.edited if old else {}
        versions = _versions(before, chunks)
        edited = {id: now for id, now in versions.items() if before[id] in (None, now)}
        if changed := sorted(before.keys() - edited.keys()):
            self.say(
                f"what was added or removed no longer counts for {len(changed):,} documents, "
                f"because they changed in the run: {_shown(changed)}"
            )
        first = [chunk for chunk in chunks if _owner(chunk.id, chunk.start, edited) not in edited]
        added = [] if old is None else _added(self.folder, old, edited)
        if not first and not added:
            raise RefineFastError(
                "index: no passage is left, since every document of the run was removed from the "
                f"index; delete {self.folder.path} to have them back, or add documents to the run."
            )
        texts = {chunk.id: chunk.text for chunk in (*first, *added)}
        dev = held_out(lambda ids: texts)
        asked, vectors = self._asked(dev)
        names = []
        for part in (first, added):
            if part:
                names.append(self._segment(part, kind, vectors))
        manifest = Manifest(key, tuple(names), None, edited)
        manifest = self._with_blend(manifest, dev, asked, vectors)
        self.folder.commit(manifest)
        return manifest

    def with_blend_of(self, manifest: Manifest, dev: Sequence[Query]) -> Manifest:
        """The index with the blend that ``dev`` chooses; ``manifest`` itself if they chose its
        blend. No passage is encoded.

        Args:
            manifest: the index.
            dev: held-out queries.
        """
        if manifest.blend.get("chosen_by") == _digest(dev):
            return manifest
        changed = self._with_blend(manifest, dev, *self._asked(dev))
        self.folder.commit(changed)
        return changed

    def _asked(self, dev: Sequence[Query]) -> tuple[list[str], np.ndarray | None]:
        """The distinct texts and their vectors; None without any."""
        asked = list(dict.fromkeys(query.text for query in dev))
        return asked, self.encoders.queries("product", asked) if asked else None

    def _segment(
        self, chunks: Sequence[Chunk], kind: Kind | None, queries: np.ndarray | None = None
    ) -> str:
        def encode(name: str, texts: Sequence[str], out: Path) -> None:
            with self.progress(f"embedding {name}") as progress:
                side: Side = "base" if name == "base" else "product"
                self.encoders.documents(side, texts, out=out, progress=progress)

        with self.folder.new_segment() as folder:
            has_base = "base" in self.encoders.folders
            write_segment(folder, chunks, split_passages(chunks), encode, base=has_base)
            finish_segment(folder, kind, queries)
        return folder.name

    def _with_blend(
        self,
        manifest: Manifest,
        dev: Sequence[Query],
        asked: Sequence[str],
        vectors: np.ndarray | None,
    ) -> Manifest:
        choice = self._choose(manifest, dev, asked, vectors)
        return replace(manifest, blend={**choice.facts(), "chosen_by": _digest(dev)})

    def _choose(
        self,
        manifest: Manifest,
        dev: Sequence[Query],
        asked: Sequence[str],
        vectors: np.ndarray | None,
    ) -> BlendChoice:
        if vectors is None:
            return choose_blend(Choosing([], []))

        index = Index.open(self.folder, manifest)
        row = {id: i for i, id in enumerate(index.column("id")) if index.alive[i]}
        relevant: dict[str, dict[int, float]] = {text: {} for text in asked}
        for query in dev:
            if query.chunk_id in row:
                relevant[query.text][row[query.chunk_id]] = 1.0
        kept = [(text, v) for text, v in zip(asked, vectors, strict=True) if relevant[text]]
        kind_of = {query.text: query.kind for query in dev}
        return choose(
            Choosing(
                [index.components(text, vector).trimmed() for text, vector in kept],
                [relevant[text] for text, _ in kept],
            ),
            [kind_of[text] for text, _ in kept],
        )

    def change(
        self,
        manifest: Manifest,
        added: Sequence[Chunk],
        replaced: Iterable[str],
        removed: Iterable[str],
        kind: Kind | None = None,
    ) -> Manifest:
        """Adds and removes whole documents. Only what is added is encoded.

        Args:
            manifest: the index.
            added: the chunks of new documents, and of changed ones, whose old chunks die.
            replaced: ids of the documents of ``added``.
            removed: ids of documents.
            kind: as for ``build``.

        Raises:
            RefineFastError: if a document to remove is not there.
        """
        self.folder.sweep(manifest)
        index = Index.open(self.folder, manifest)
        replaced, removed = frozenset(replaced), frozenset(removed)
        ids, starts = index.column("id"), index.column("start")
        documents = removed | replaced
        live = np.flatnonzero(index.alive)
        owner = {int(row): _owner(ids[row], starts[row], documents) for row in live}
        if missing := removed - set(owner.values()):
            raise RefineFastError(
                f"remove: no document {min(missing)!r} is in the index; "
                f"give the id of one that is, such as {next(iter(owner.values()))!r}."
            )
        if replaced:
            changed_ids = replaced & set(owner.values())
            self.say(
                f"{len(changed_ids):,} documents are replaced, "
                f"{len(replaced - changed_ids):,} are new"
            )
        dying = [row for row, document in owner.items() if document in documents]
        if len(dying) == len(live) and not added:
            raise RefineFastError("remove: the index would be empty; keep at least one document.")
        run = [index.chunk(row) for row in dying if owner[row] not in manifest.edited]
        rows = np.concatenate([np.flatnonzero(~index.alive), np.array(dying, np.int64)])
        names = list(manifest.segments)
        if added:
            names.append(self._segment(added, kind))
        changed = replace(
            manifest,
            segments=tuple(names),
            dead=self.folder.write_dead(np.sort(rows)) if len(rows) else None,
            edited=dict(sorted({**_versions(documents, run), **manifest.edited}.items())),
        )
        changed = self._merged(changed, kind)
        self.folder.commit(changed)
        return changed

    def _merged(self, manifest: Manifest, kind: Kind | None) -> Manifest:
        """The same index with fewer segments of what was added; nothing is encoded.

        One is merged with all after it where those hold as many live passages: n additions leave
        log2(n) segments for a search to visit, and copy no passage more than log2(n) times.
        """
        index = Index.open(self.folder, manifest)
        live = [np.flatnonzero(index.alive[a:b]) for a, b in pairwise(index.starts)]
        first, passages = len(live), 0
        while first > 1 and (first == len(live) or len(live[first - 1]) <= passages):
            first -= 1
            passages += len(live[first])
        if first == len(live) or (first == len(live) - 1 and passages):
            return manifest
        names = list(manifest.segments[:first])
        if passages:
            with self.folder.new_segment() as folder:
                _merge(list(zip(index.segments[first:], live[first:], strict=True)), folder)
                finish_segment(folder, kind)
            names.append(folder.name)
        dead = np.flatnonzero(~index.alive[: index.starts[first]])
        return replace(
            manifest,
            segments=tuple(names),
            dead=self.folder.write_dead(dead) if len(dead) else None,
        )


def _owner(chunk_id: str, start: int, known: Container[str]) -> str:
    """The document of a chunk, which begins at ``start`` there: the whole id if that is a
    document's, or if the chunk cannot be a part that others precede, as the issue "INC#1001"."""
    document = document_id(chunk_id)
    number = chunk_id[len(document) + 1 :]
    # Part 0 may be gone as a duplicate of another, but every part before took a character.
    is_part = number.isdecimal() and len(number) < 10 and int(number) <= start
    return document if is_part and chunk_id not in known else chunk_id


def _versions(documents: Iterable[str], chunks: Iterable[Chunk]) -> dict[str, str]:
    """A digest of the words of each document in ``chunks``, in whatever chunks it is cut."""
    digests = {id: hashlib.sha256() for id in documents}
    for chunk in chunks:
        if own := digests.get(_owner(chunk.id, chunk.start, digests)):
            own.update("".join(re.findall(r"\w+", chunk.text)).encode())
    return {id: digest.hexdigest() for id, digest in digests.items()}


def _shown(ids: Sequence[str], most: int = 5) -> str:
    """The first of some ids, and how many there are besides."""
    more = f" and {len(ids) - most:,} more" if len(ids) > most else ""
    return ", ".join(map(repr, ids[:most])) + more


def _digest(dev: Sequence[Query]) -> str:
    """Of the queries that choose a blend."""
    text = json.dumps([[query.text, query.chunk_id, query.kind] for query in dev])
    return hashlib.sha256(text.encode()).hexdigest()


def _added(folder: IndexFolder, manifest: Manifest, edited: Container[str]) -> list[Chunk]:
    """The chunks of those documents in ``edited`` that were added: those of the run are dead."""
    if not manifest.edited:
        return []
    index = Index.open(folder, manifest)
    parts = zip(index.column("id"), index.column("start"), index.alive, strict=True)
    return [
        index.chunk(row)
        for row, (id, start, alive) in enumerate(parts)
        if alive and _owner(id, start, manifest.edited) in edited
    ]


def sources_of(index: Index) -> dict[str, str]:
    """Id of each passage, and of the document that it is or may be a part of -> its source."""
    ids, starts, sources = (index.column(name) for name in ("id", "start", "source"))
    return {
        either: source
        for id, start, source, alive in zip(ids, starts, sources, index.alive, strict=True)
        if alive
        for either in (id, _owner(id, start, ()))
    }


def _merge(parts: Sequence[tuple[Segment, np.ndarray]], folder: Path) -> None:
    """Writes a segment with some rows of others; their vectors are copied."""

    def copy(name: str, _: Sequence[str], out: Path) -> None:
        sources = [
            (
                segment.vectors[name],
                rows_of_groups(segment.offsets, rows)[0] if name == "sentences" else rows,
            )
            for segment, rows in parts
        ]
        n, end = sum(len(rows) for _, rows in sources), 0
        merged = reserve(out, np.float32, (n, sources[0][0].shape[1]))
        for vectors, rows in sources:
            for start in range(0, len(rows), TILE_ROWS):
                tile = vectors[rows[start : start + TILE_ROWS]]
                merged[end : end + len(tile)] = tile
                end += len(tile)
        merged.flush()

    live = [(segment, int(row)) for segment, rows in parts for row in rows]
    write_segment(
        folder,
        [segment.chunk(row) for segment, row in live],
        [segment.sentences(row) for segment, row in live],
        copy,
        base="base" in parts[0][0].vectors,
    )
