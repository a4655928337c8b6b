"""train: contrastive fine-tuning of the base encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ...files import as_argument, write_json
from ..artifacts import (
    ADAPTER,
    CHUNKS,
    DEV,
    EMBEDDINGS,
    HELD_OUT,
    NEGATIVES,
    QUERIES,
    TAUGHT,
    TRAINING_FACTS,
    TUNED,
    Judgements,
    base_embeddings,
    read_negatives,
    read_taught,
    relevant_rows,
    similarity_unit,
    training_view,
)
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records
from ..encoder.encode import has_fast_bf16
from ..encoder.load import load_encoder
from ..encoder.prepare import CODE, copy_missing
from ..queries.query import Query
from ..ranks import Ranks, launched
from ..training.batches import Example, Twin
from ..training.memory import Fit, fit_training
from ..training.teachers import Judged, Teachers, lexical_teacher
from ..training.trained import Trained
from ..training.trainer import epochs_of, train

if TYPE_CHECKING:
    from ..context import RunContext

READ = (CHUNKS, QUERIES, DEV, HELD_OUT, NEGATIVES, EMBEDDINGS)
"""What training reads in the run folder, with TAUGHT where there is a teacher."""
_WRITTEN = (TUNED, ADAPTER, TRAINING_FACTS)
"""What rank 0 writes, ADAPTER with ``--lora``."""


def run(
    context: RunContext,
    folder: Path,
    *,
    distill: float,
    negatives: int,
    similar_batches: bool,
    taught: Literal["cross-encoder", "llm"] | None,
    saved: Callable[[], None] | None = None,
) -> None:
    """Writes the fine-tuned encoder, and the steps and losses of its training. With ``--lora`` also
    the adapter, whose product is part of the fine-tuned encoder's weights.

    Every rank of the run calls it; rank 0 writes, and calls ``saved`` after each checkpoint. Where
    workers of the run train, each calls it too, as a rank."""
    config, ranks = context.config, launched()
    if ranks is None and context.workers is not None:
        as_rank = partial(
            run,
            distill=distill,
            negatives=negatives,
            similar_batches=similar_batches,
            taught=taught,
        )
        most = min(config.batch_size, len(read_records(context.path(QUERIES), Query)))
        read = READ if taught is None else (*READ, TAUGHT)
        if context.train_by_workers(folder, as_rank, read, _WRITTEN, most=most):
            return
    if ranks is not None and ranks.rank == 0:
        ranks.announce_training(folder)
    chunks, queries = training_view(context.out)
    relevant = relevant_rows(chunks, queries)
    judged = None if taught is None else read_taught(context.out)
    examples = _examples(context.out, chunks, relevant, negatives, judged)
    passages = [chunk.passage for chunk in chunks]
    model = load_encoder(context.encoder, trust_remote_code=context.trust_remote_code)
    adapters = Trained(config.lora, config.train_layers).choose(model)
    bf16 = has_fast_bf16(model.device) if context.bf16 is None else context.bf16
    precision = "bf16" if bf16 else "fp32"
    on_cpu = model.device.type == "cpu"
    fit = fit_training(
        model,
        relevant,
        passages,
        len(examples),
        batch_size=config.batch_size if ranks is None else -(-config.batch_size // ranks.size),
        negatives=negatives,
        memory=config.memory,
        bf16=bf16,
        processes=ranks.local_size if ranks is not None and on_cpu else 1,
    )
    _say_how(context, fit, precision, ranks)
    twin = Twin(float(config.weight), *base_embeddings(context.out)) if context.twin else None
    logits = None if judged is None else _logits(chunks, relevant, judged)
    named = None
    if logits is not None and taught is not None:
        named = Judged(logits, config.teacher_temperature, taught)
    teachers = _teachers(context, relevant, passages, named) if distill else None
    # A twin's embeddings are unit vectors, whatever the encoder's are.
    unit = 1.0 if context.twin else similarity_unit(context.out)
    epochs = epochs_of(len(examples), batch_size=config.batch_size, epochs=config.epochs)
    if ranks is not None:
        facts = _what_decides(context, examples, passages, logits)
        how = {"distill": distill, "similar_batches": similar_batches}
        ranks.require_same({**facts, "precision": precision, **how})
        ranks.join("gloo" if on_cpu else "nccl")
    with context.console.progress("training") as progress:
        history = train(
            model,
            examples,
            passages,
            folder / "checkpoints",
            epochs=epochs,
            max_steps=config.max_steps,
            batch_size=config.batch_size,
            lr=config.lr,
            warmup=config.warmup,
            temperature=config.temperature * unit,
            mini_batch=fit.mini_batch,
            cached=fit.cached,
            bf16=bf16,
            memory=fit.peak,
            seed=config.seed,
            grouped_by=_positives(context, examples) if similar_batches else None,
            twin=twin,
            teachers=teachers,
            distill=distill,
            progress=progress,
            ranks=ranks,
            saved=saved,
        )
    if ranks is not None:
        ranks.leave()
        if ranks.rank > 0:
            return
    for i, adapter in enumerate(adapters):
        only = len(adapters) == 1
        adapter.save_pretrained(str(folder / ADAPTER if only else folder / ADAPTER / str(i)))
        adapter.merge_and_unload()
    model.save_pretrained(str(folder / TUNED), create_model_card=False)
    copy_missing(context.encoder, folder / TUNED, CODE)
    facts = {
        **history,
        "examples": len(examples),
        "precision": precision,
        "distill": distill,
        "negatives": negatives,
        "similar_batches": similar_batches,
        "teachers": [] if teachers is None else teachers.names,
    }
    write_json(folder / TRAINING_FACTS, facts)


def _teachers(
    context: RunContext,
    relevant: dict[str, list[int]],
    passages: Sequence[str],
    named: Judged | None,
) -> Teachers:
    """The frozen encoder, with the teacher that was ``named``; without one, with BM25 where it
    ranks the training queries' positives higher."""
    config = context.config
    queries, documents = base_embeddings(context.out)
    lexical = None
    if named is None:
        lexical = lexical_teacher(
            list(relevant),
            list(relevant.values()),
            passages,
            (queries, documents),
            seed=config.seed,
        )
    teachers = Teachers(queries, documents, config.temperature, lexical, named)
    context.console.say(f"  teachers: {', '.join(teachers.names)}")
    return teachers


def _examples(
    out: Path,
    chunks: Sequence[Chunk],
    relevant: dict[str, list[int]],
    most: int,
    judged: Judgements | None,
) -> list[Example]:
    """One example for each query and each of its positives, with ``most`` negatives at most."""
    row = {chunk.id: i for i, chunk in enumerate(chunks)}
    if judged is None:
        mined = read_negatives(out)
    else:
        mined = {text: about["negatives"] for text, about in judged.items()}
    negatives = {
        text: tuple(row[negative["chunk_id"]] for negative in found[:most])
        for text, found in mined.items()
    }
    return [
        Example(text, positive, negatives[text], frozenset(positives), i)
        for i, (text, positives) in enumerate(relevant.items())
        for positive in positives
    ]


def _logits(
    chunks: Sequence[Chunk], relevant: dict[str, list[int]], judged: Judgements
) -> list[dict[int, float]]:
    """Of each query: row of a passage -> its logit; empty if the query was not judged. That of a
    relabelled passage counts where another query brings the passage into the batch."""
    row = {chunk.id: i for i, chunk in enumerate(chunks)}
    return [
        {
            row[found["chunk_id"]]: found["logit"]
            for kind in judged[text].values()
            for found in kind
            if "logit" in found
        }
        for text in relevant
    ]


def _positives(context: RunContext, examples: Sequence[Example]) -> np.ndarray:
    """The frozen embedding of each example's positive, (examples, d) float32."""
    _, documents = base_embeddings(context.out)
    return documents[[example.positive for example in examples]]


def _what_decides(
    context: RunContext,
    examples: Sequence[Example],
    passages: Sequence[str],
    logits: list[dict[int, float]] | None,
) -> dict[str, object]:
    """What every rank must have alike, since each reads it for itself."""
    fields = "epochs max_steps batch_size lr warmup temperature seed lora train_layers fusion" + (
        " teacher_temperature" if logits is not None else ""
    )
    if context.twin:
        fields += " weight"  # it is part of the loss
    data = hashlib.sha256(repr([(e.query, e.positive, e.negatives) for e in examples]).encode())
    data.update(repr((passages, logits)).encode())
    return {
        **{name: getattr(context.config, name) for name in fields.split()},
        "training data": data.hexdigest(),
    }


def _say_how(context: RunContext, fit: Fit, precision: str, ranks: Ranks | None) -> None:
    how = "a batch at once" if fit.mini_batch is None else f"{fit.mini_batch} sequences at a time"
    how += ", gradients cached" if fit.cached else ""
    each = "" if ranks is None else " for each process"
    context.console.say(f"  {how}, in {precision}: about {fit.peak / 2**30:.1f} GB of memory{each}")
    if ranks is not None:
        context.console.say(
            f"  {ranks.size} processes share each batch of {context.config.batch_size} queries"
        )
    elif (gpus := torch.cuda.device_count()) > 1:
        again = f"train --out {as_argument(context.out)}"
        every = f"torchrun --nproc-per-node {gpus} -m refine_fast {again}"
        if context.chooses_distill:  # which torchrun's processes do not share
            every = f"refine-fast {again} --engine ray"
        context.console.say(
            f"  {gpus} GPUs are visible; training uses the first (all of them: {every})"
        )
