"""``refine-fast index``: the index of a run that ``search`` and ``serve`` read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ...errors import RefineFastError
from ...files import as_argument, name_of, read_json, walk
from ..artifacts import CHUNKS, DEV, FUSION_FACTS, MODEL
from ..code_version import code_version
from ..config_file import saved_config
from ..console import Console
from ..context import RunContext
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records
from ..encoder.load import encoder_folder, load_encoder
from ..encoder.model_files import of_the_model
from ..encoder.prepare import prepare_encoder
from ..engine import RunFolder
from ..evaluation.significance import Gain
from ..queries.query import Query
from ..queries.user_formats import query_files
from ..reporting.format import points
from ..serving import build
from ..serving.ann import Kind
from ..serving.build import Builder, sources_of
from ..serving.encoders import LABELS, Encoders, Side
from ..serving.judged import JUDGED, Judged, Texts
from ..serving.search import CODE, Index
from ..serving.storage import IndexFolder, Manifest
from ..stages.chunk import cut, read_documents

MIN_JUDGED = 50
"""Marked queries that are enough to choose the blend by; fewer are added to the held-out ones."""


def index(
    out: Path,
    console: Console,
    *,
    kind: Kind | Literal["auto"] | None = None,
    add: Path | None = None,
    remove: Sequence[str] = (),
) -> None:
    """Builds the index of the finished run ``out`` unless it is up to date, or changes documents.

    An index that is up to date gets another blend if other queries choose it now.

    Args:
        out: the run folder.
        console: told what is done.
        kind: of the faiss indexes; auto: by size; None: as it was, auto at first.
        add: documents to add; those with the id of a document that is there replace it.
        remove: ids of documents to remove.

    Raises:
        RefineFastError: if the run is not finished, has no index to change, or a damaged one.
    """
    context, encoders = serving_encoders(out, console)
    folder = IndexFolder(out)
    with RunFolder(out):
        manifest = folder.manifest()
        chosen = kind or (manifest.key.get("--type") if manifest else None) or "auto"
        of_kind = None if chosen == "auto" else chosen
        key = index_key(out, encoders, chosen)
        builder = Builder(folder, encoders, console.progress, console.say)
        if add is not None or remove:
            if manifest is None or different(manifest, key):
                of_type = "" if kind is None else f" --type {kind}"
                raise RefineFastError(
                    f"index: {out} has no index that is up to date; "
                    f"make it first: refine-fast index {as_argument(out)}{of_type}."
                )
            known = sources_of(Index.open(folder, manifest))
            manifest = builder.change(manifest, *_documents(context, add, known), remove, of_kind)
        else:
            chunks = read_records(out / CHUNKS, Chunk)
            held_out = partial(held_out_queries, out, console, chunks)
            reasons = ["not done yet"] if manifest is None else different(manifest, key)
            if manifest is None or reasons:
                console.say(f"index: {'; '.join(reasons)}")
                manifest = builder.build(chunks, held_out, key, of_kind)
            else:
                old, dev = manifest, held_out(Index.open(folder, manifest).texts)
                manifest = builder.with_blend_of(old, dev)
                news = "up to date" if manifest is old else "marks or passages changed; new blend"
                console.say(f"index: {news}")
    _show(folder, manifest, console)


def serving_encoders(out: Path, console: Console) -> tuple[RunContext, Encoders]:
    """The encoders of a finished run.

    Raises:
        RefineFastError: if the run is not finished.
    """
    for name in (MODEL, CHUNKS):
        if not (out / name).exists():
            raise RefineFastError(
                f"index: {out} has no {name}; finish the run first: "
                f"refine-fast run --out {as_argument(out)}."
            )
    config = saved_config(out)
    options = config.encoder_options()
    base = prepare_encoder(encoder_folder(config.model), options, say=console.say)
    context = RunContext(config, base, console, options)
    folders: dict[Side, Path] = {"product": out / MODEL}
    if (read_json(out / FUSION_FACTS) or {}).get("weight") != 0:
        folders["base"] = base
    return context, Encoders(folders, context.bf16, context.trust_remote_code)


def index_key(out: Path, encoders: Encoders, kind: str) -> dict[str, Any]:
    """What an index is made from, by digest."""
    return {
        **_content(out, encoders.folders),
        "the held-out queries": _digest(out / DEV),
        "--type": kind,
        CODE: code_version(build.__name__).modules,
    }


def _content(out: Path, folders: Mapping[Side, Path]) -> dict[str, str]:
    """The digests of the passages and of the encoders in ``folders``."""
    encoders = {LABELS[side]: folder for side, folder in folders.items()}
    files = {"the passages": out / CHUNKS, **encoders}
    return {label: _digest(path) for label, path in files.items()}


def refuse_older(command: str, out: Path, folders: Mapping[Side, Path]) -> None:
    """Refuses an index of other passages, or of other vectors of ``folders``, than the run's.

    Args:
        command: for the message.
        out: the run folder.
        folders: the encoders whose vectors are used.

    Raises:
        RefineFastError: if the index is older than the run.
    """
    manifest = IndexFolder(out).manifest()
    if manifest is None:
        return
    if stale := different(manifest, {**manifest.key, **_content(out, folders)}):
        raise RefineFastError(
            f"{command}: the index is older than the run ({'; '.join(stale)}); "
            f"make it again: refine-fast index {as_argument(out)}."
        )


def different(manifest: Manifest, key: dict[str, Any]) -> list[str]:
    """What has changed since an index was made; empty if it is up to date."""
    labels = key.keys() | manifest.key.keys()
    return sorted(f"{x} changed" for x in labels if key.get(x) != manifest.key.get(x))


def _digest(path: Path) -> str:
    files = [(path, "")] if path.is_file() else sorted(walk(path), key=lambda item: item[1])
    digest = hashlib.sha256()
    for file, name in files:
        if not of_the_model(file):
            continue  # a report changes the product's card, not its vectors
        with file.open("rb") as opened:
            digest.update(name_of(name).encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def held_out_queries(
    out: Path, console: Console, chunks: Sequence[Chunk], texts: Texts
) -> list[Query]:
    """The queries that choose the blend: a person's marks if they are enough, else those and the
    run's held-out queries.

    Args:
        out: the run folder.
        console: told how many of either are of passages that are gone or have changed.
        chunks: of the run.
        texts: of the passages in the index.
    """
    marks, others = Judged(out / JUDGED).matching(texts)
    if others:
        console.say(f"{others:,} marks do not count: their passages have changed or are gone")
    marked = [Query(text, doc_id, "user") for text, doc_id in marks]
    if len({query.text for query in marked}) >= MIN_JUDGED:
        return marked
    held_out = read_records(out / DEV, Query)
    found = texts({query.chunk_id for query in held_out})
    return [*marked, *of_same_passages(held_out, chunks, found, console)]


def of_same_passages(
    queries: Sequence[Query], chunks: Iterable[Chunk], texts: Mapping[str, str], console: Console
) -> list[Query]:
    """The queries whose passages have the texts that they were made from: an edit or another cut
    gives the id to another passage.

    Args:
        queries: of the run.
        chunks: of the run.
        texts: passage id -> text, in the index.
        console: told how many queries are left out.
    """
    asked = {query.chunk_id for query in queries}
    before = {chunk.id: chunk.text for chunk in chunks if chunk.id in asked}
    kept = [
        query
        for query in queries
        if query.chunk_id in texts and texts[query.chunk_id] == before.get(query.chunk_id)
    ]
    if others := len(queries) - len(kept):
        console.say(
            f"{others:,} held-out queries do not count: their passages have changed or are gone"
        )
    return kept


def _documents(
    context: RunContext, path: Path | None, known: Mapping[str, str]
) -> tuple[list[Chunk], list[str]]:
    """The chunks of documents, read, named and cut as the run's, and the documents' ids. ``known``
    is that of ``Reading``."""
    if path is None:
        return [], []
    config = context.config
    asked = () if config.queries is None else query_files(config.queries)
    documents = read_documents(
        context, path, root=config.docs, known=known, exclude=[context.out, *asked]
    )
    encoder = load_encoder(context.encoder, trust_remote_code=context.trust_remote_code)
    return cut(context, encoder, documents), [document.id for document in documents]


def _show(folder: IndexFolder, manifest: Manifest, console: Console) -> None:
    segments = {name: read_json(folder.path / name / "segment.json") for name in manifest.segments}
    console.result({"index": str(folder.path), "blend": manifest.blend, "segments": segments})
    for name, about in segments.items():
        kinds = ", ".join(
            f"{vectors} {facts['kind']}"
            + ("" if facts["kind"] == "flat" else f" (recall@10 {facts['recall@10']:.3f})")
            for vectors, facts in about["indexes"].items()
        )
        console.say(
            f"{name}: {about['product']:,} passages, {about['sentences']:,} sentences, "
            f"{about['bytes'] / 1e6:,.0f} MB; {kinds}"
        )
    blend = manifest.blend
    if blend["queries"]:
        gains = {name: Gain(**change) for name, change in blend["gains"].items()}
        shown = ", ".join(f"{name} {points(change)}" for name, change in gains.items())
        console.say(
            f"blend: best sentence {blend['sentences']:g}, BM25 {blend['lexical']:g}, chosen on "
            f"{blend['queries']:,} held-out queries; gain in {blend['metric']}: {shown}"
        )
    else:
        console.say("blend: passage vectors alone; there are no held-out queries to choose by")
    console.say(f"the index is {folder.path}")
