"""``refine-fast export --format onnx|int8|openvino``: the product as a graph, for other servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from ...errors import RefineFastError
from ...files import as_argument, atomic_folder
from ..artifacts import CHUNKS, MODEL
from ..console import Console
from ..corpus.chunk import Chunk
from ..corpus.jsonl import read_records
from ..encoder.encode import Role, compares_by_cosine, encode, prompt_of
from ..encoder.graph import (
    Graph,
    Run,
    check_graphable,
    onnx_run,
    openvino_run,
    write_files,
    write_int8,
    write_onnx,
    write_openvino,
)
from ..evaluation.evaluate import score_vectors
from ..queries.splits import held_out_set
from ..reporting.graph_card import graph_card
from ..reporting.loss import Loss
from .export_target import held_out_queries, load_product, loss_sentence, naming_extras, target_path

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

TOLERANCE = 1e-5
"""The largest difference of a coordinate to the encoder's, relative to the longest vector."""

CHECKED = 64
"""Passages that are compared."""

QUERIES, PASSAGES = 500, 2000
"""The most of the held-out queries and of the passages that the loss of int8 is measured on."""

ROLES: tuple[Role, ...] = ("query", "document")

_EXTRAS = {
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "openvino": "openvino",
}


@dataclass(frozen=True)
class _Format:
    graph: str
    """Its path in the folder, where sentence-transformers looks for it."""
    run: Callable[[Path], Run]
    convert: Callable[[Path, Path], None] | None = None
    """Makes it of the ONNX graph; None: it is that graph."""
    exact: bool = True


FORMATS = {
    "onnx": _Format("onnx/model.onnx", onnx_run),
    "int8": _Format("onnx/model.onnx", onnx_run, write_int8, exact=False),
    "openvino": _Format("openvino/openvino_model.xml", openvino_run, write_openvino),
}


def export_model(
    out: Path, format: str, target: str | None, console: Console, *, overwrite: bool = False
) -> None:
    """Writes the product of a run as a graph, and compares its vectors with the encoder's.

    Args:
        out: the run folder.
        format: one of FORMATS.
        target: a folder; None: in the run folder.
        console: told what was written.
        overwrite: whether to replace an earlier export.

    Raises:
        RefineFastError: no product, a missing package, an encoder that is no graph, vectors that
            are not the encoder's, or a target that cannot be written.
    """
    path = target_path(out, format, "", target, overwrite=overwrite)
    how = FORMATS[format]
    model = load_product(out).to("cpu")
    check_graphable(model)
    chunks = read_records(out / CHUNKS, Chunk)
    if not chunks:
        raise RefineFastError(
            f"export: {out / CHUNKS} holds no passages; make it again: "
            f"refine-fast run --out {as_argument(out)}."
        )
    prompts = {role: prompt_of(model, role) or "" for role in ROLES}
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_extras(format, _EXTRAS), atomic_folder(path) as folder:
        write_files(model, out / MODEL, folder)
        (folder / how.graph).parent.mkdir()
        _write_graph(how, model, folder / how.graph)
        graph = Graph.open(folder, how.run(folder / how.graph))
        difference, similarity = _compared(model, graph, _longest_and_others(chunks), prompts)
        if how.exact and not difference <= TOLERANCE:
            raise RefineFastError(
                f"export: the {format} graph's vectors differ from the encoder's by "
                f"{difference:.1g}, and at most {TOLERANCE:g} is allowed, so nothing was written; "
                f"serve {out / MODEL} with sentence-transformers instead."
            )
        loss = None if how.exact else _loss(out, chunks, model, graph, prompts, console)
        card = graph_card(
            format,
            how.graph,
            prompts=prompts,
            tokens=graph.max_tokens,
            unit=compares_by_cosine(model),
            difference=difference,
            similarity=similarity,
            loss=loss,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    console.result(
        {
            "export": str(path),
            "format": format,
            "graph": str(path / how.graph),
            "difference": difference,
            "cosine": similarity,
            "loss": None if loss is None else loss.facts(),
        }
    )
    _say(path, how, difference, similarity, loss, console)


def _write_graph(how: _Format, model: SentenceTransformer, path: Path) -> None:
    if how.convert is None:
        write_onnx(model, path)
        return
    with TemporaryDirectory(dir=path.parent) as folder:
        source = Path(folder) / "model.onnx"
        write_onnx(model, source)
        how.convert(source, path)


def _longest_and_others(chunks: Sequence[Chunk]) -> list[str]:
    """Passages of every length, the longest too."""
    passages = sorted((chunk.passage for chunk in chunks), key=len)
    places = np.linspace(0, len(passages) - 1, min(CHECKED, len(passages)))
    return [passages[place] for place in places.round().astype(int)]


def _compared(
    model: SentenceTransformer, graph: Graph, texts: Sequence[str], prompts: dict[Role, str]
) -> tuple[float, float]:
    """The largest difference of the graph's vectors to the encoder's, and their mean cosine."""
    differences, cosines = [], []
    for role in ROLES:
        theirs, ours = (
            encode(model, texts, role=role, bf16=False),
            graph.encode(texts, prompts[role]),
        )
        longest = np.linalg.norm(theirs, axis=1).max()
        differences.append(np.abs(theirs - ours).max() / max(longest, 1))
        lengths = np.linalg.norm(theirs, axis=1) * np.linalg.norm(ours, axis=1)
        cosines.append((theirs * ours).sum(1) / np.maximum(lengths, 1e-12))
    return float(max(differences)), float(np.mean(cosines))


def _loss(
    out: Path,
    chunks: Sequence[Chunk],
    model: SentenceTransformer,
    graph: Graph,
    prompts: dict[Role, str],
    console: Console,
) -> Loss | None:
    """On the run's held-out queries; None without any."""
    queries = held_out_queries(out)
    if not queries:
        return None
    data = held_out_set(chunks, queries).sample(queries=QUERIES, docs=PASSAGES, seed=0)

    with console.progress("measuring the loss") as progress:
        before = score_vectors(
            data,
            encode(model, data.queries, role="query", bf16=False),
            encode(model, data.docs, role="document", bf16=False, progress=progress),
        )
    after = score_vectors(
        data,
        graph.encode(data.queries, prompts["query"]),
        graph.encode(data.docs, prompts["document"]),
    )
    return Loss(len(data.docs), len(data.queries), before, after)


def _say(
    path: Path,
    how: _Format,
    difference: float,
    similarity: float,
    loss: Loss | None,
    console: Console,
) -> None:
    if how.exact:
        console.say(f"the vectors differ from the encoder's by at most {difference:.1g}")
    else:
        console.say(f"mean cosine to the encoder's vectors: {similarity:.4f}")
        console.say(loss_sentence(loss))
    console.say(f"the graph is {path / how.graph}; {path / 'README.md'} says how to call it")
