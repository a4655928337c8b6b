"""What each stage of a run does: reads the files of the stages before it, writes its own under the folder that it is given."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RefineFastError, RefineFastWarning
from ..fuse import fuse, fuse_into
from ..integrations.sentence_transformers.twin import TwinEncoder
from ..mine import mine as mine_negatives
from .card import model_card
from .chunks import Chunk, Duplicates, chunk_documents, deduplicate
from .config import DEFAULT_ENCODER
from .documents import Document, load_documents
from .embed import encode, has_fast_bf16
from .encoder import device, load_encoder
from .evaluate import Scores, choose_weight, score, score_bm25
from .held_out import held_out_set, split_by_document
from .job import Job
from .jsonl import read_records, write_records
from .llm_queries import ACCOUNT, written_queries
from .memory import fit_training
from .queries import Query, load_queries, synthesize_queries, without
from .retrieval_set import RetrievalSet, load_beir
from .stages import read_json, write_json
from .train import Example, Twin, train

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEV_SHARE = 0.1
"""Share of the documents whose queries choose the weight under ``--weight auto``."""


ELSEWHERE = 500
"""Passages of the built-in out-of-domain check."""


def cut_documents(job: Job) -> tuple[int, list[Chunk], Duplicates]:
    """The number of documents, their chunks, and what was removed as duplicates."""
    with job.console.progress("reading documents") as progress:
        documents = load_documents(job.config.docs, progress)
    chunks, duplicates = _cut(job, documents)
    if job.config.limit is not None:
        chunks = _whole_sources(chunks, job.config.limit, job.config.seed)
    if len(chunks) < 2:
        raise RefineFastError(f"docs: {job.config.docs} gives {len(chunks)} chunks of text, too few to learn from; give more documents.")
    return len(documents), chunks, duplicates


def _cut(job: Job, documents: Sequence[Document]) -> tuple[list[Chunk], Duplicates]:
    encoder = load_encoder(job.encoder)
    longest = min(job.config.chunk_tokens, encoder.max_seq_length or job.config.chunk_tokens)
    with job.console.progress("cutting documents, characters") as progress:
        chunks = chunk_documents(documents, encoder.tokenizer, max_tokens=longest, progress=progress)
    with job.console.progress("removing duplicates") as progress:
        return deduplicate(chunks, progress=progress)


def make_chunks(job: Job, to: Path) -> None:
    documents, chunks, duplicates = cut_documents(job)
    write_records(to / "chunks.jsonl", chunks)
    write_json(to / "chunks.json", {"documents": documents, "chunks": len(chunks), "duplicates": vars(duplicates)})


def _whole_sources(chunks: Sequence[Chunk], limit: int, seed: int) -> list[Chunk]:
    """At most ``limit`` chunks, source by source in an order drawn by the seed, in their old order."""
    names = sorted({chunk.source for chunk in chunks})
    np.random.default_rng(seed).shuffle(names)
    of_source = defaultdict(list)
    for chunk in chunks:
        of_source[chunk.source].append(chunk)
    kept = {chunk.id for chunk in [chunk for name in names for chunk in of_source[name]][:limit]}
    return [chunk for chunk in chunks if chunk.id in kept]


def own_queries(job: Job, chunks: Sequence[Chunk]) -> list[Query]:
    """The user's queries, or those that need no model."""
    if job.config.queries is not None:
        return load_queries(job.config.queries, chunks)
    return synthesize_queries(chunks, seed=job.config.seed, per_chunk=job.config.queries_per_chunk)


def split_queries(job: Job, chunks: Sequence[Chunk], queries: list[Query]) -> dict[str, list[Query]]:
    """Of "train", and "held_out" and "dev" where they are needed: queries by whole documents, none of them a judged test query."""
    config = job.config
    if job.judged:
        queries = without(queries, load_beir(job.judged).queries)
    shares = ({} if job.judged else {"held_out": config.held_out}) | ({"dev": DEV_SHARE} if config.weight == "auto" else {})
    return split_by_document(queries, chunks, shares, seed=config.seed)


def make_queries(job: Job, to: Path) -> None:
    chunks = read_records(job.path("chunks.jsonl"), Chunk)
    if job.config.llm is None:
        queries = own_queries(job, chunks)
    else:
        queries, account = written_queries(job, chunks)
        write_json(to / ACCOUNT, account.to_dict())
    parts = split_queries(job, chunks, queries)
    for name, file in (("train", "queries"), ("dev", "dev"), ("held_out", "held_out")):
        write_records(to / f"{file}.jsonl", parts.get(name, []))


def learnable(job: Job) -> tuple[list[Chunk], list[Query]]:
    """The chunks that training may see (those of a held-out document it may not) and its queries."""
    chunks = read_records(job.path("chunks.jsonl"), Chunk)
    queries = read_records(job.path("queries.jsonl"), Query)
    source_of = {chunk.id: chunk.source for chunk in chunks}
    held = {query.chunk_id for name in ("dev", "held_out") for query in read_records(job.path(f"{name}.jsonl"), Query)}
    sources = {source_of[chunk] for chunk in held} - {source_of[query.chunk_id] for query in queries}
    return [chunk for chunk in chunks if chunk.id not in held and chunk.source not in sources], queries


def require_enough(queries: Sequence[Query]) -> None:
    """Of those to train on: a lone one has no other's document to tell its own from. Raises RefineFastError."""
    if len(queries) < 2:
        raise RefineFastError(f"queries: {len(queries)} left to train on, too few to learn from; give more documents or --queries.")


def relevant_rows(chunks: Sequence[Chunk], queries: Sequence[Query]) -> dict[str, list[int]]:
    """Query text -> rows of the chunks that answer it."""
    row = {chunk.id: i for i, chunk in enumerate(chunks)}
    relevant: dict[str, list[int]] = {}
    for query in queries:
        relevant.setdefault(query.text, []).append(row[query.chunk_id])
    return relevant


def embed(job: Job, to: Path) -> None:
    chunks, queries = learnable(job)
    require_enough(queries)
    model = load_encoder(job.encoder)
    (to / "embeddings").mkdir(exist_ok=True)
    with job.console.progress("embedding queries") as progress:
        q = encode(model, list(relevant_rows(chunks, queries)), role="query", bf16=job.bf16, progress=progress)
    with job.console.progress("embedding chunks") as progress:
        d = encode(model, [chunk.passage for chunk in chunks], role="document", bf16=job.bf16, progress=progress)
    np.save(to / "embeddings" / "queries.npy", q)
    np.save(to / "embeddings" / "chunks.npy", d)


def base_embeddings(job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of the distinct training queries and of the chunks under the base, mapped."""
    q, d = (np.load(job.path(f"embeddings/{name}.npy"), mmap_mode="r") for name in ("queries", "chunks"))
    return q, d


def mine(job: Job, to: Path) -> None:
    config = job.config
    chunks, queries = learnable(job)
    relevant = relevant_rows(chunks, queries)
    q, d = base_embeddings(job)
    try:
        with job.console.progress("mining") as progress:
            mined = mine_negatives(
                q, d, list(relevant.values()), k=max(1, config.negatives), band=config.band, skip=config.skip,
                select=config.select, seed=config.seed, progress=progress,
            )  # fmt: skip
    except ValueError as reason:
        raise RefineFastError(f"mine: {reason}.") from None
    ids, scores, in_band = (np.asarray(column) for column in (mined.ids, mined.scores, mined.in_band))
    with (to / "negatives.jsonl").open("w", encoding="utf-8") as file:
        for text, row, values in zip(relevant, ids, scores, strict=True):
            negatives = [{"chunk_id": chunks[i].id, "score": round(float(s), 6)} for i, s in zip(row, values, strict=True) if i >= 0]
            file.write(json.dumps({"query": text, "negatives": negatives[: config.negatives]}, ensure_ascii=False) + "\n")
    empty = int(np.sum(in_band == 0))
    low, high = mined.band
    facts = {"band": [low, high], "empty": empty, "median_in_band": float(np.median(in_band)), "queries": len(q)}
    write_json(to / "mining.json", facts)
    if 2 * empty > len(q) and config.negatives:
        warnings.warn(
            f"the band [{low:g}, {high:g}] after the {config.skip} most similar is empty for {empty} of {len(q)} queries under this"
            " encoder, so they train on in-batch negatives alone; --band auto fits the band to the encoder.",
            RefineFastWarning,
            stacklevel=2,
        )


def read_negatives(job: Job) -> dict[str, list[dict[str, Any]]]:
    """Query text -> its mined negatives, {"chunk_id", "score"} each."""
    with job.path("negatives.jsonl").open(encoding="utf-8") as file:
        return {record["query"]: record["negatives"] for record in map(json.loads, file)}


def train_encoder(job: Job, to: Path) -> None:
    config = job.config
    chunks, queries = learnable(job)
    relevant = relevant_rows(chunks, queries)
    row = {chunk.id: i for i, chunk in enumerate(chunks)}
    negatives = {text: tuple(row[negative["chunk_id"]] for negative in found) for text, found in read_negatives(job).items()}
    examples = [
        Example(text, positive, negatives[text], frozenset(positives), i)
        for i, (text, positives) in enumerate(relevant.items())
        for positive in positives
    ]
    model = load_encoder(job.encoder)
    bf16 = has_fast_bf16(model.device) if job.bf16 is None else job.bf16
    passages = [chunk.passage for chunk in chunks]
    fit = fit_training(config, model, relevant, passages, len(examples), bf16=bf16)
    how = f"{fit.at_once} sequences at a time, gradients cached" if fit.cached else f"all {fit.at_once} sequences of a batch at once"
    job.console.say(f"  {how}, in {'bf16' if bf16 else 'fp32'}: about {fit.peak / 2**30:.1f} GB of memory")
    with job.console.progress("training") as progress:
        history = train(
            model, examples, passages, to / "checkpoints",
            epochs=config.epochs, max_steps=config.max_steps, batch_size=config.batch_size, lr=config.lr, warmup=config.warmup,
            temperature=config.temperature, mini_batch=fit.at_once if fit.cached else None, bf16=bf16, seed=config.seed, progress=progress,
            twin=Twin(chosen_weight(job), *base_embeddings(job)) if job.twin else None,
        )  # fmt: skip
    model.save_pretrained(str(to / "tuned"), create_model_card=False)
    write_json(to / "training.json", {**history, "examples": len(examples), "precision": "bf16" if bf16 else "fp32"})


def make_elsewhere(job: Job, to: Path) -> None:
    """The built-in out-of-domain check: a sample of Python's documentation, a keyword query for each chunk."""
    chunks, _ = _cut(job, load_documents(None))
    drawn = np.random.default_rng(job.config.seed).permutation(len(chunks))[: min(ELSEWHERE, job.config.ood_passages)]
    chunks = [chunks[i] for i in sorted(drawn)]
    queries = synthesize_queries(chunks, seed=job.config.seed, per_chunk=4)
    write_records(to / "elsewhere.jsonl", chunks)
    write_records(to / "elsewhere-queries.jsonl", [query for query in queries if query.kind == "span"])


def retrieval_sets(job: Job) -> dict[str, RetrievalSet]:
    """What is judged on: "in_domain"; "dev" where a weight is to be chosen; each out-of-domain set under its name."""
    chunks = read_records(job.path("chunks.jsonl"), Chunk)
    sets = {}
    if job.judged:
        sets["in_domain"] = load_beir(job.judged)
    else:
        sets["in_domain"] = held_out_set(chunks, read_records(job.path("held_out.jsonl"), Query))
    if job.config.weight == "auto":
        sets["dev"] = held_out_set(chunks, read_records(job.path("dev.jsonl"), Query))
    if job.own_check:
        elsewhere = read_records(job.path("elsewhere.jsonl"), Chunk), read_records(job.path("elsewhere-queries.jsonl"), Query)
        sets["ood:python-docs"] = held_out_set(*elsewhere, "python-docs")
    for folder in job.config.ood or ():
        data = load_beir(folder)
        sets[f"ood:{folder.name}"] = data.sample(queries=len(data.queries), docs=job.config.ood_passages, seed=job.config.seed)
    return sets


def encoder_at(job: Job, weight: float) -> SentenceTransformer:
    """The base (weight 0), the fine-tuned encoder (1), or what is fused of them."""
    if job.twin and 0 < weight < 1:
        return twin_encoder(job, weight)
    model = load_encoder(job.encoder)
    if weight > 0:
        fuse_into(model, job.path("tuned"), weight)
    return model


def twin_encoder(job: Job, weight: float) -> SentenceTransformer:
    return TwinEncoder(load_encoder(job.path("tuned")), load_encoder(job.encoder), weight).model(device().type)


def score_system(job: Job, to: Path, weight: float | None) -> None:
    """Scores of the encoder at a fusion weight, or of BM25 (None), on every set."""
    sets = retrieval_sets(job)
    if weight is None:
        write_json(to / "sets.json", {name: len(data.docs) for name, data in sets.items()})
        scores = {name: score_bm25(data) for name, data in sets.items()}
    else:
        model = encoder_at(job, weight)
        scores = {}
        for name, data in sets.items():
            with job.console.progress(f"weight {weight:g} on {data.name}") as progress:
                scores[name] = score(model, data, progress=progress)
    rows = {name: {metric: values.tolist() for metric, values in result.per_query.items()} for name, result in scores.items()}
    write_json(to / score_file(weight), rows)


def score_file(weight: float | None) -> str:
    return "scores-bm25.json" if weight is None else f"scores-{weight:g}.json"


def read_scores(job: Job, weight: float | None) -> dict[str, Scores]:
    rows = read_json(job.path(score_file(weight)))
    return {name: Scores({metric: np.array(values) for metric, values in columns.items()}) for name, columns in rows.items()}


def all_scores(job: Job, weight: float) -> dict[str, dict[str, Scores]]:
    """System -> set -> scores, the systems that every account of a run shows."""
    return {name: read_scores(job, at) for name, at in (("BM25", None), ("base", 0.0), ("fine-tuned", 1.0), ("fused", weight))}


def chosen_weight(job: Job) -> float:
    if job.config.weight != "auto":
        return float(job.config.weight)
    return choose_weight({weight: read_scores(job, weight)["dev"] for weight in job.weights})


def fuse_encoder(job: Job, to: Path) -> None:
    weight = chosen_weight(job)
    if job.twin:
        twin_encoder(job, weight).save_pretrained(str(to / "model"), create_model_card=False)
    else:
        fuse(job.encoder, job.path("tuned"), to / "model", weight, overwrite=True)
    card = model_card(job.encoder, base_name(job), weight, recipe(job, weight), all_scores(job, weight), twin=job.twin)
    (to / "model" / "README.md").write_text(card, encoding="utf-8")


def base_name(job: Job) -> str:
    if job.config.model == DEFAULT_ENCODER:
        return "sentence-transformers/all-MiniLM-L6-v2"
    folder = Path(job.config.model)
    return folder.name if folder.is_absolute() else job.config.model


def query_source(job: Job) -> str:
    config = job.config
    if config.queries is not None:
        return f"from {config.queries.name}"
    if config.llm is not None:
        return f"written by {', '.join(config.llm_model)}"
    return "made from the documents without an LLM"


def recipe(job: Job, weight: float) -> dict[str, str]:
    """What was done, for the card and the report."""
    config = job.config
    mining, training = read_json(job.path("mining.json")), read_json(job.path("training.json"))
    low, high = mining["band"]
    fused = "embeddings, in the loss too" if job.twin else "parameters"
    return {
        "queries": f"{mining['queries']}, {query_source(job)}",
        "loss": f"InfoNCE, temperature {config.temperature:g}, in-batch negatives (batch {config.batch_size}), each document once",
        "hard negatives": f"{config.negatives} per query: after the {config.skip} most similar, cosine in [{low:.2f}, {high:.2f}],"
        f" {config.select}; none for {mining['empty']} of the queries",
        "optimizer": f"AdamW, learning rate {config.lr:g}, {training['steps']} steps, warm-up {config.warmup:g}, seed {config.seed}",
        "fusion": f"weight {weight:g} of the fine-tuned {fused}" + (", chosen on held-out queries" if config.weight == "auto" else ""),
    }
