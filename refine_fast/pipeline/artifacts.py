"""The files of a run folder: their names, and the readers that several stages share.

Each function takes the run folder ``out``. A stage's key covers everything that the stage imports,
so this module imports only the types of the files: a change of the configuration or of a metric
does not invalidate chunking.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import read_json, write_json
from .corpus.chunk import Chunk
from .corpus.jsonl import read_records
from .evaluation.scores import Scores
from .queries.query import Query

CHUNKS, CHUNK_FACTS = "chunks.jsonl", "chunks.json"
"""Every Chunk; the number of documents, of chunks and of removed duplicates."""
TWINS = "twins.json"
"""Id of a labelled chunk that was removed as an exact duplicate -> id of the kept one."""
QUERIES, DEV, HELD_OUT = "queries.jsonl", "dev.jsonl", "held_out.jsonl"
"""Queries to train on, to choose the weight on, and to evaluate on."""
REPLIES, ACCOUNT = "replies.jsonl", "llm.json"
"""Every paid reply of a language model, kept when options change; calls, tokens, cost, drops."""
EMBEDDINGS = "embeddings"
"""Folder: the training queries, the chunks of ``training_view`` and the other chunks under the base
encoder (``queries.npy``, ``chunks.npy``, ``held_out.npy``); ``similarity.json``: how it compares
them, and its prompts."""
SENTENCES = "sentences"
"""With ``--mine-by sentence``, a folder: the sentences of the chunks of ``training_view`` under the
base encoder (``sentences.npy``), and where each chunk's begin (``offsets.npy``)."""
NEGATIVES, MINING_FACTS = "negatives.jsonl", "mining.json"
"""Mined negatives of each query; the band, and how many queries found nothing in it."""
TAUGHT, TEACHING_FACTS = "taught.jsonl", "teaching.json"
"""With a teacher that was named: its logits of each query's positives and mined negatives, and
which of the negatives it scores above a positive; how many of each there are."""
TUNED, TRAINING_FACTS = "tuned", "training.json"
"""Folder of the fine-tuned encoder; steps, losses and precision of its training."""
DISTILL_FACTS = "distill.json"
"""With ``--distill choose``: the share that was chosen, and the scores of each."""
ADAPTER = "adapter"
"""Folder of the LoRA adapter, with ``--lora``; TUNED holds the base with it merged."""
FUSION_FACTS = "fusion.json"
"""The weight of the product and the reason for it."""
SYSTEMS = ("BM25", "base", "fine-tuned", "fused")
"""What is scored on the test sets."""
SETS = "sets.json"
"""Retrieval set -> number of passages that a query is scored against."""
SERVED = "systems.json"
"""The scores of the systems that can be served (passages, sentences, BM25, blends)."""
MODEL = "model"
"""Folder of the product."""


def stage_costs(out: Path) -> dict[str, tuple[float, int]]:
    """Stage -> the seconds that it took when it was last done, over all its starts, and the peak
    memory of the last start in MiB."""
    manifest = read_json(out / "manifest.json") or {}
    return {name: (record["seconds"], record["peak_mb"]) for name, record in manifest.items()}


def training_view(out: Path) -> tuple[list[Chunk], list[Query]]:
    """The chunks that training may see, without those of held-out documents, and its queries.

    A chunk that answers a query of training is seen, even if it also answers a held-out one whose
    other answer is in a held-out document.
    """
    chunks = read_records(out / CHUNKS, Chunk)
    queries = read_records(out / QUERIES, Query)
    source_of = {chunk.id: chunk.source for chunk in chunks}
    held = {query.chunk_id for name in (DEV, HELD_OUT) for query in read_records(out / name, Query)}
    held -= {query.chunk_id for query in queries}
    asked = {source_of[query.chunk_id] for query in queries}
    sources = {source_of[chunk] for chunk in held} - asked
    seen = [c for c in chunks if c.id not in held and c.source not in sources]
    return seen, queries


def relevant_rows(chunks: Sequence[Chunk], queries: Sequence[Query]) -> dict[str, list[int]]:
    """Query text -> rows of the chunks that answer it."""
    row = {chunk.id: i for i, chunk in enumerate(chunks)}
    relevant: dict[str, list[int]] = {}
    for query in queries:
        relevant.setdefault(query.text, []).append(row[query.chunk_id])
    return relevant


def base_embeddings(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings under the base encoder, memory-mapped float32: the distinct training queries
    (Q, d) in the order of ``relevant_rows``, and the chunks of ``training_view`` (N, d).

    Unit vectors if the encoder compares by cosine; else the queries are divided by
    ``similarity_unit``.
    """
    folder = out / EMBEDDINGS
    queries = np.load(folder / "queries.npy", mmap_mode="r")
    return queries, np.load(folder / "chunks.npy", mmap_mode="r")


def base_sentences(out: Path) -> tuple[np.ndarray, np.ndarray]:
    """The sentences (S, d) of the chunks of ``training_view``, each with its title in front, as in
    ``base_embeddings``, and the (N + 1,) offsets of each chunk's."""
    folder = out / SENTENCES
    return np.load(folder / "sentences.npy", mmap_mode="r"), np.load(folder / "offsets.npy")


def held_out_chunks(chunks: Sequence[Chunk], seen: Sequence[Chunk]) -> list[Chunk]:
    """The chunks that are not in the ``training_view``, ``seen``."""
    known = {chunk.id for chunk in seen}
    return [chunk for chunk in chunks if chunk.id not in known]


def base_passages(out: Path) -> dict[str, np.ndarray]:
    """Text of every chunk's passage -> its embedding under the base encoder, as in
    ``base_embeddings``: what has been encoded once need not be encoded again."""
    seen, _ = training_view(out)
    others = held_out_chunks(read_records(out / CHUNKS, Chunk), seen)
    known: dict[str, np.ndarray] = {}
    for name, chunks in (("chunks.npy", seen), ("held_out.npy", others)):
        rows = np.load(out / EMBEDDINGS / name, mmap_mode="r")
        known |= zip((chunk.passage for chunk in chunks), rows, strict=True)
    return known


def similarity_unit(out: Path) -> float:
    """What one unit of the band and of the temperature stands for: 1 under a cosine; the mean
    ``|q| * |d|`` under the base encoder if it compares by dot product."""
    return float(read_json(out / EMBEDDINGS / "similarity.json")["unit"])


def compared_by_cosine(out: Path) -> bool:
    """Whether the base encoder compares by cosine; otherwise by dot product."""
    return bool(read_json(out / EMBEDDINGS / "similarity.json")["similarity"] == "cosine")


def similarity_name(out: Path) -> str:
    """The similarity that the band and every score of mining count in, in words."""
    if compared_by_cosine(out):
        return "cosine"
    return f"dot product divided by {similarity_unit(out):.4g}"


def base_prompts(out: Path) -> tuple[str, str]:
    """What the base encoder puts before a query and before a document; empty if nothing."""
    facts = read_json(out / EMBEDDINGS / "similarity.json")
    return facts.get("query_prompt") or "", facts.get("document_prompt") or ""


def read_negatives(out: Path) -> dict[str, list[dict[str, Any]]]:
    """Query text -> its mined negatives, {"chunk_id", "score"} each."""
    with (out / NEGATIVES).open(encoding="utf-8") as file:
        return {record["query"]: record["negatives"] for record in map(json.loads, file)}


Judgements = dict[str, dict[str, list[dict[str, Any]]]]
"""What ``read_taught`` returns."""


def to_judge(out: Path) -> tuple[list[Chunk], dict[str, list[int]]]:
    """What a teacher that was named reads: the chunks of ``training_view``; query text -> the rows
    of its positives and then of its mined negatives."""
    chunks, queries = training_view(out)
    row = {chunk.id: i for i, chunk in enumerate(chunks)}
    mined = read_negatives(out)
    return chunks, {
        text: [*positives, *(row[negative["chunk_id"]] for negative in mined[text])]
        for text, positives in relevant_rows(chunks, queries).items()
    }


def write_taught(
    out: Path, folder: Path, logits: Iterable[Sequence[float] | None]
) -> dict[str, int]:
    """Writes what ``read_taught`` reads.

    A negative with a logit above that of a positive is likely an answer that nobody marked (RLHN,
    arXiv 2505.16967): it is relabelled.

    Args:
        out: the run folder.
        folder: where to write it.
        logits: of each query of ``to_judge``, those of its rows, or None if it was not judged.

    Returns:
        How many "pairs" have a logit, how many of them are "negatives", and how many of those are
        "relabelled".
    """
    chunks, queries = training_view(out)
    mined = read_negatives(out)
    facts = {"pairs": 0, "negatives": 0, "relabelled": 0}
    with (folder / TAUGHT).open("w", encoding="utf-8") as file:
        for (text, rows), known in zip(relevant_rows(chunks, queries).items(), logits, strict=True):
            positives = [{"chunk_id": chunks[i].id} for i in rows]
            negatives = mined[text]
            relabelled: list[dict[str, Any]] = []
            if known is not None:
                pairs = zip([*positives, *negatives], known, strict=True)
                judged = [{**each, "logit": logit} for each, logit in pairs]
                positives, found = judged[: len(rows)], judged[len(rows) :]
                lowest = min(each["logit"] for each in positives)
                negatives = [each for each in found if each["logit"] <= lowest]
                relabelled = [each for each in found if each["logit"] > lowest]
                facts["pairs"] += len(judged)
                facts["negatives"] += len(found)
                facts["relabelled"] += len(relabelled)
            kinds = {"positives": positives, "negatives": negatives, "relabelled": relabelled}
            file.write(json.dumps({"query": text, **kinds}, ensure_ascii=False) + "\n")
    return facts


def read_taught(out: Path) -> Judgements:
    """Query text -> what the teacher says: its "positives" and the "negatives" to train on,
    {"chunk_id", "logit"} each, and the mined negatives that are "relabelled" since it scores them
    above a positive. Negatives also have the "score" that mining gave them. The passages of a query
    that it did not judge have no "logit"."""
    with (out / TAUGHT).open(encoding="utf-8") as file:
        return {record.pop("query"): record for record in map(json.loads, file)}


def score_file(system: str) -> str:
    """The file of the scores of one of ``SYSTEMS`` on the test sets."""
    return f"scores-{system.lower()}.json"


def at_share(distill: float) -> str:
    """The folder of what was trained with a share of the teachers, among which one is chosen: the
    files have the names that the chosen one's have in the run folder."""
    return f"distill/{float(distill)!r}"


def curve_file(weight: float) -> str:
    """The file of the scores at a fusion weight on "dev", queries about held-out documents, and
    on "guard", general knowledge. Distinct weights differ in name."""
    return f"curve-{float(weight)!r}.json"


def write_scores(path: Path, sets: Mapping[str, Scores]) -> None:
    """Writes every query's value of every metric, for each retrieval set."""
    write_json(
        path,
        {
            name: {metric: values.tolist() for metric, values in scores.per_query.items()}
            for name, scores in sets.items()
        },
    )


def read_scores(path: Path) -> dict[str, Scores]:
    """What ``write_scores`` wrote."""
    sets = read_json(path)
    return {
        name: Scores({metric: np.array(values) for metric, values in columns.items()})
        for name, columns in sets.items()
    }


def all_scores(out: Path) -> dict[str, dict[str, Scores]]:
    """System -> test set -> scores."""
    return {system: read_scores(out / score_file(system)) for system in SYSTEMS}


def fused_weight(out: Path) -> float:
    """The weight of the product, given or chosen."""
    return float(read_json(out / FUSION_FACTS)["weight"])
