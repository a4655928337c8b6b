"""``refine-fast export``: the mined training set of a run, for another trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...errors import RefineFastError
from ...files import as_argument, atomic, atomic_folder
from ..artifacts import (
    CHUNKS,
    DEV,
    EMBEDDINGS,
    HELD_OUT,
    NEGATIVES,
    QUERIES,
    Judgements,
    base_embeddings,
    base_prompts,
    read_negatives,
    read_taught,
    relevant_rows,
    similarity_unit,
    training_view,
)
from ..config_file import saved_config
from ..console import Console
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records
from ..engine import RunFolder
from ..queries import export_formats
from ..queries.export_formats import BEIR_FILES, MinedQuery, TrainingSet, with_random_negatives
from ..queries.query import Query
from .export_target import STDOUT, target_path

SUFFIXES = {
    "triplets": ".jsonl",
    "flagembedding": ".jsonl",
    "tevatron": ".jsonl",
    "llama_index": ".json",
    "beir": "",
    "parquet": ".parquet",
}
"""Format -> suffix of its file, by which trainers recognize it; of a folder none."""

_TEXT: dict[str, Callable[[TrainingSet], Iterator[str]]] = {
    "triplets": export_formats.triplets,
    "flagembedding": export_formats.flagembedding,
    "tevatron": export_formats.tevatron,
    "llama_index": export_formats.llama_index,
}
_NEEDS_NEGATIVES = ("triplets", "flagembedding", "tevatron")
"""The trainers of these fail on a query without negatives."""


def export(
    out: Path, format: str, target: str | None, console: Console, *, overwrite: bool = False
) -> None:
    """Writes the training set of a run that has been mined.

    Args:
        out: the run folder.
        format: one of SUFFIXES.
        target: a file, or a folder for beir; "-": stdout; None: in the run folder.
        console: told what was written.
        overwrite: whether to replace an earlier export.

    Raises:
        RefineFastError: if the run is not mined, or ``target`` cannot be written.
    """
    _check_mined(out)
    path = None
    if target != STDOUT or format not in _TEXT:
        path = target_path(
            out, format, SUFFIXES[format], target, overwrite=overwrite, own=BEIR_FILES
        )
    taught = _taught(out, console)
    if taught is not None:
        taught = _judged(taught, console)
    data = _training_set(out, taught)
    mined = sum(len(query.negatives) for query in data.queries)
    empty = sum(not query.negatives for query in data.queries)
    if empty and format in _NEEDS_NEGATIVES:
        if taught is None:
            complete = with_random_negatives(data, _Similarity(out))
            why = "that every passage answers are left out"
        else:
            complete = replace(data, queries=[query for query in data.queries if query.negatives])
            why = "are left out, since no other passage has the teacher's score"
        left_out = len(data.queries) - len(complete.queries)
        done = [f"{empty - left_out} get a random passage"] if left_out < empty else []
        done += [f"{left_out} {why}"] if left_out else []
        console.warn(
            f"{empty} of {len(data.queries)} queries have no mined negative, and a trainer of this "
            f"format needs one: {', '.join(done)}."
        )
        data = complete
    if path is None:
        _print(_TEXT[format](data))
    else:
        _write(out, format, data, path)
    positives = sum(len(query.positives) for query in data.queries)
    facts = {
        "export": str(path),
        "format": format,
        "queries": len(data.queries),
        "positives": positives,
        "mined_negatives": mined,
        "without_mined_negatives": empty,
    }
    if path is not None:
        console.result(facts)
    where = "on stdout" if path is None else f"in {path}"
    console.say(
        f"{len(data.queries):,} queries with {positives:,} positives and {mined:,} mined negatives "
        f"are {where}" + ("" if taught is None else "; their scores are the logits of the teacher")
    )
    _say_prompts(out, console)


def _check_mined(out: Path) -> None:
    """The negatives must be those of the run's chunks and queries: a run that was stopped half-way
    may hold newer ones."""
    if not (out / "manifest.json").is_file():
        raise RefineFastError(
            f"export: {out} is not a run folder; give one that refine-fast run or mine has made."
        )
    files = {name: out / name for name in (CHUNKS, QUERIES, DEV, HELD_OUT, EMBEDDINGS)}
    if reasons := RunFolder(out).changes("mine", files):
        raise RefineFastError(
            f"export: {out} holds no mined training set that is up to date (mine: "
            f"{'; '.join(reasons)}); finish it first: refine-fast mine --out {as_argument(out)}."
        )


def _taught(out: Path, console: Console) -> Judgements | None:
    """What the run's teacher says of the mined training set. None: it has no teacher, or, with a
    warning, the teacher has not scored this set."""
    config = saved_config(out)
    if config.teacher is None:
        return None
    files = {name: out / name for name in (CHUNKS, QUERIES, DEV, HELD_OUT, NEGATIVES)}
    settings = {"teacher": config.teacher, "llm_model": config.llm_model}
    reasons = RunFolder(out).changes("teach", files, settings)
    if not reasons:
        return read_taught(out)
    console.warn(
        f"the teacher's scores are not up to date (teach: {'; '.join(reasons)}), so the base "
        f"encoder's are exported; refine-fast train --out {as_argument(out)} makes the teacher's."
    )
    return None


def _judged(taught: Judgements, console: Console) -> Judgements:
    """Those of the queries that the teacher has judged."""
    judged = {
        text: about
        for text, about in taught.items()
        if all("logit" in positive for positive in about["positives"])
    }
    if left_out := len(taught) - len(judged):
        console.warn(
            f"{left_out} of {len(taught)} queries are left out, since the teacher has not graded "
            "their passages."
        )
    return judged


def _training_set(out: Path, taught: Judgements | None) -> TrainingSet:
    passages, queries = training_view(out)
    row = {chunk.id: i for i, chunk in enumerate(passages)}
    relevant = relevant_rows(passages, queries)
    if taught is None:
        similarity, unit = _Similarity(out), similarity_unit(out)
        negatives = read_negatives(out)
        mined = [
            MinedQuery(
                text,
                tuple((passages[p], similarity(i, p)) for p in dict.fromkeys(positives)),
                tuple(
                    (passages[row[found["chunk_id"]]], round(found["score"] * unit, 6))
                    for found in negatives[text]
                ),
            )
            for i, (text, positives) in enumerate(relevant.items())
        ]
    else:
        mined = [
            MinedQuery(
                text,
                *(
                    tuple((passages[row[id]], logit) for id, logit in logits.items())
                    for kind in ("positives", "negatives")
                    for logits in [{each["chunk_id"]: each["logit"] for each in taught[text][kind]}]
                ),
            )
            for text in relevant
            if text in taught
        ]
    return TrainingSet(passages, mined, base_prompts(out)[0])


class _Similarity:
    """The base encoder's own similarity between a training query and a passage, by their rows."""

    def __init__(self, out: Path) -> None:
        self._queries, self._passages = base_embeddings(out)
        self._unit = similarity_unit(out)

    def __call__(self, query: int, passage: int) -> float:
        return round(float(np.dot(self._queries[query], self._passages[passage])) * self._unit, 6)


def _write(out: Path, format: str, data: TrainingSet, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "beir":
        splits = {
            "dev": read_records(out / DEV, Query),
            "test": read_records(out / HELD_OUT, Query),
        }
        with atomic_folder(path) as folder:
            export_formats.write_beir(folder, data, read_records(out / CHUNKS, Chunk), splits)
        return
    with atomic(path) as temporary:
        if format == "parquet":
            export_formats.write_parquet(temporary, data)
        else:
            with temporary.open("w", encoding="utf-8", newline="") as file:
                file.writelines(_TEXT[format](data))


def _print(lines: Iterator[str]) -> None:
    """UTF-8 on stdout, until the reader has enough."""
    try:
        for line in lines:
            sys.stdout.buffer.write(line.encode())
        sys.stdout.flush()
    except BrokenPipeError:  # of ``| head``; the interpreter would report it again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_prompts(out: Path, console: Console) -> None:
    query, document = base_prompts(out)
    prompts = {"queries": query, "passages": document}
    sides = [f"{prompt!r} before {what}" for what, prompt in prompts.items() if prompt]
    if sides:
        console.say(
            f"the texts are without prompts; the base encoder puts {' and '.join(sides)}, so tell "
            "the trainer to do the same"
        )
