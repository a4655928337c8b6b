"""``refine-fast export --format vectors|faiss|lancedb|qdrant``: the index, to serve elsewhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ...files import atomic, atomic_folder
from ..artifacts import CHUNKS, MODEL
from ..config_file import saved_config
from ..console import Console
from ..corpus.chunk import Chunk
from ..corpus.jsonl import each_record
from ..encoder.encode import compares_by_cosine, encode
from ..evaluation.evaluate import score_vectors
from ..queries.splits import held_out_set
from ..reporting.loss import Loss
from ..serving import exports
from ..serving.compact import CompactVectors, Numbers
from ..serving.search import Index, open_index
from .export_target import (
    held_out_queries,
    load_product,
    loss_sentence,
    naming_extras,
    target_path,
)
from .index import of_same_passages, refuse_older

SUFFIX = {"vectors": ".parquet"}
"""Format -> suffix of its file; the others are folders."""

QUERIES = 1000
"""The most of the held-out queries that the loss of compact vectors is measured on."""


def export_index(
    out: Path,
    format: str,
    target: str | None,
    console: Console,
    *,
    overwrite: bool = False,
    numbers: Numbers = "float32",
    dimensions: int | None = None,
) -> None:
    """Writes the passages of a run's index and their vectors.

    Args:
        out: the run folder, with an index.
        format: one of ``exports.WRITERS``.
        target: where it goes; None: in the run folder.
        console: told what was written.
        overwrite: whether to replace an earlier export.
        numbers: how the format vectors stores each number.
        dimensions: how many of them it keeps; None: all.

    Raises:
        RefineFastError: no index, one that is older than the run, a missing package, or a target
            that cannot be written.
    """
    smaller = numbers != "float32" or dimensions is not None
    refuse_older("export", out, {"product": out / MODEL})
    _, index = open_index(out)
    suffix = SUFFIX.get(format, "")
    path = target_path(out, format, suffix, target, overwrite=overwrite)
    writer, loss, facts = exports.WRITERS[format], None, {}
    if smaller:
        compact, loss = _compact(out, index, numbers, dimensions, console)
        writer = partial(exports.write_vectors, compact=compact)
        facts = {**compact.facts(), "loss": None if loss is None else loss.facts()}
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = (atomic if suffix else atomic_folder)(path)
    with naming_extras(format, exports.EXTRAS), writing as temporary:
        writer(temporary, index)
    console.result({"export": str(path), "format": format, "passages": index.count, **facts})
    if smaller:
        console.say(loss_sentence(loss))
    console.say(f"{index.count:,} passages with their vectors are in {path}")


def _compact(
    out: Path, index: Index, numbers: Numbers, dimensions: int | None, console: Console
) -> tuple[CompactVectors, Loss | None]:
    """How the vectors are stored, and what it costs on the run's held-out queries. Those are
    stored as the passages are."""
    ids, vectors = exports.ids_and_vectors(index)
    model = load_product(out)
    compact = CompactVectors.of(vectors, numbers, dimensions, unit=compares_by_cosine(model))
    held = held_out_queries(out)
    texts = index.texts({query.chunk_id for query in held})
    held = of_same_passages(held, each_record(out / CHUNKS, Chunk), texts, console)
    if not held:
        return compact, None
    chunks = [Chunk(id, "", "", "", 0, 0) for id in ids]  # a score of vectors reads no text
    data = held_out_set(chunks, held).sample(queries=QUERIES, docs=len(chunks), seed=0)
    asked = encode(model, data.queries, role="query", bf16=saved_config(out).bf16)
    before = score_vectors(data, asked, vectors)
    after = score_vectors(data, compact.compared(asked), compact.compared(vectors))
    return compact, Loss(len(data.docs), len(data.queries), before, after)
