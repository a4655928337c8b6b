"""The index in the formats of other servers, each loaded by its own library."""

from __future__ import annotations

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refine_fast.arguments import INDEX_FORMATS
from refine_fast.cli import main
from refine_fast.pipeline.commands import export_index
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import read_records, write_records
from refine_fast.pipeline.encoder.encode import encode
from refine_fast.pipeline.queries.query import Query
from refine_fast.pipeline.serving import exports
from refine_fast.pipeline.serving.compact import CompactVectors
from refine_fast.pipeline.serving.exports import WRITERS
from refine_fast.pipeline.serving.segment import Segment

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(indexed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(indexed, tmp_path / "run")


@pytest.fixture
def expected(run: Path) -> dict[str, np.ndarray]:
    """Passage id -> its vector."""
    vectors = np.load(next((run / "index").glob("s*/product.npy")))
    chunks = read_records(run / "chunks.jsonl", Chunk)
    return {chunk.id: vector for chunk, vector in zip(chunks, vectors, strict=True)}


def export(run: Path, format: str) -> Path:
    assert main(["export", str(run), "--format", format, "--quiet"]) == 0
    return run / "export" / f"{format}{'.parquet' if format == 'vectors' else ''}"


def test_the_command_line_knows_every_format() -> None:
    assert set(INDEX_FORMATS) == set(WRITERS)


def test_vectors(run: Path, expected: dict[str, np.ndarray]) -> None:
    from pyarrow import parquet

    rows = parquet.read_table(export(run, "vectors")).to_pylist()
    assert {row["id"] for row in rows} == set(expected)
    for row in rows:
        np.testing.assert_array_equal(np.float32(row["vector"]), expected[row["id"]])
    texts = {chunk.id: chunk.text for chunk in read_records(run / "chunks.jsonl", Chunk)}
    assert {row["id"]: row["text"] for row in rows} == texts


def test_faiss(run: Path, expected: dict[str, np.ndarray]) -> None:
    import faiss

    folder = export(run, "faiss")
    index, ids = (
        faiss.read_index(str(folder / "vectors.faiss")),
        json.loads((folder / "ids.json").read_text()),
    )
    for row, id in enumerate(ids):
        np.testing.assert_array_equal(index.reconstruct(row), expected[id])


def test_lancedb(run: Path, expected: dict[str, np.ndarray]) -> None:
    lancedb = pytest.importorskip("lancedb", reason="needs lancedb: pip install '.[lancedb]'")
    table = lancedb.connect(str(export(run, "lancedb"))).open_table("passages")
    assert table.count_rows() == len(expected)
    for row in table.to_arrow().to_pylist():
        np.testing.assert_allclose(row["vector"], expected[row["id"]], atol=1e-6)


def test_qdrant(run: Path, expected: dict[str, np.ndarray]) -> None:
    qdrant = pytest.importorskip(
        "qdrant_client", reason="needs qdrant-client: pip install '.[qdrant]'"
    )
    client = qdrant.QdrantClient(path=str(export(run, "qdrant")))
    points, _ = client.scroll("passages", limit=10_000, with_vectors=True)
    assert len(points) == len(expected)
    for point in points:
        np.testing.assert_allclose(point.vector, expected[point.payload["id"]], atol=1e-5)
    client.close()


@pytest.mark.parametrize("numbers", ["float32", "int8", "binary"])
def test_compact_vectors(
    run: Path,
    expected: dict[str, np.ndarray],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    numbers: str,
) -> None:
    """Their similarities, and what they cost: a query with two answers is one query. The run's
    precision is that of its queries."""
    from pyarrow import parquet

    held = read_records(run / "held_out.jsonl", Query)
    again = next(query for query in held if query.chunk_id != held[0].chunk_id)
    write_records(run / "held_out.jsonl", [*held, replace(again, text=held[0].text)])
    precisions = []

    def recorded(*arguments: object, bf16: bool | None = None, **options: object) -> np.ndarray:
        precisions.append(bf16)
        return encode(*arguments, bf16=bf16, **options)

    monkeypatch.setattr(export_index, "encode", recorded)
    command = ["export", str(run), "--format", "vectors", "--vectors", numbers, "--dims", "24"]
    assert main([*command, "--json", "--quiet"]) == 0
    facts = json.loads(capsys.readouterr().out)
    table = parquet.read_table(run / "export" / "vectors.parquet")
    stored = json.loads(table.schema.metadata[b"refine_fast"])
    assert stored["numbers"] == numbers
    assert stored["dimensions"] == 24
    rows = {row["id"]: np.array(row["vector"]) for row in table.to_pylist()}
    cut = np.stack([expected[id][:24] for id in rows])
    cut /= np.linalg.norm(cut, axis=1, keepdims=True)
    found = np.stack(list(rows.values()))
    if numbers == "binary":
        assert str(table.schema.field("vector").type) == "fixed_size_list<element: uint8>[3]"
        np.testing.assert_array_equal(np.unpackbits(found.astype(np.uint8), axis=1), cut > 0)
    else:
        scale = stored["scale"] if numbers == "int8" else 1
        np.testing.assert_allclose(found / scale, cut, atol=0.51 / scale if scale > 1 else 1e-6)
        assert np.abs(found).max() == (127 if numbers == "int8" else np.abs(cut).max())
    loss = facts["loss"]
    assert loss["passages"] == len(expected)
    assert loss["queries"] == len(held) + len(read_records(run / "dev.jsonl", Query))
    assert precisions == [False]  # fp32
    before, after = (loss["metrics"]["ndcg@10"][when] for when in ("before", "after"))
    assert 0 <= after != before > 0


def test_compact_vectors_rank_as_their_distances() -> None:
    rng = np.random.default_rng(0)
    passages, queries = (rng.standard_normal((n, 16), np.float32) for n in (50, 3))
    bits = CompactVectors.of(passages, "binary", None, unit=False)
    packed = [bits.stored(vectors)[:, None] for vectors in (queries, passages)]
    distance = np.bitwise_count(packed[0] ^ packed[1].swapaxes(0, 1)).sum(-1)
    found = bits.compared(queries) @ bits.compared(passages).T
    np.testing.assert_array_equal(found, 16 - 2.0 * distance)
    small = CompactVectors.of(passages, "int8", 8, unit=False)
    similarity = small.compared(queries) @ small.compared(passages).T / small.scale**2
    np.testing.assert_allclose(similarity, queries[:, :8] @ passages[:, :8].T, atol=0.2)


@pytest.mark.parametrize("flags", [["vectors", "--vectors", "int8"], ["vectors"], ["faiss"]])
def test_few_texts_are_in_memory_at_a_time(
    run: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a batch and of the one before it, and those that the held-out queries ask for."""
    monkeypatch.setattr(exports, "BATCH", 2)
    read, most, chunk = weakref.WeakSet[Chunk](), 0, Segment.chunk

    def watched(self: Segment, row: int) -> Chunk:
        nonlocal most
        made = chunk(self, row)
        read.add(made)
        most = max(most, len(read))
        return made

    monkeypatch.setattr(Segment, "chunk", watched)
    assert main(["export", str(run), "--format", *flags, "--quiet"]) == 0
    assert most <= 2 * exports.BATCH
    assert len(read_records(run / "chunks.jsonl", Chunk)) > 4 * exports.BATCH


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["vectors", "--dims", "33"], "--dims: 33 is more than the vectors' 32; give fewer."),
        (
            ["vectors", "--vectors", "binary", "--dims", "20"],
            "--dims: binary vectors need a multiple of 8 dimensions (got 20); add --dims 16.",
        ),
        (
            ["vectors", "--vectors", "binary", "--dims", "4"],
            "--dims: binary vectors need a multiple of 8 dimensions (got 4); add --dims 8.",
        ),
        (["triplets", "--dims", "8"], "are for the format vectors (got triplets)"),
        (["faiss", "--out", "-"], "--out: faiss cannot be written to stdout; give a folder."),
        (["faiss", "--dims", "8"], "--dims and --vectors are for the format vectors (got faiss)"),
        (["onnx", "--vectors", "int8"], "--dims and --vectors are for the format vectors (got o"),
        (["beir", "--dims", "8"], "--dims and --vectors are for the format vectors (got beir)"),
        (["vectors", "--out", "-"], "--out: vectors cannot be written to stdout; give a file."),
        (["onnx", "--out", "-"], "--out: onnx cannot be written to stdout; give a folder."),
    ],
)
def test_compact_vectors_that_cannot_be(
    run: Path, flags: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--format", *flags]) == 2
    assert error in " ".join(capsys.readouterr().err.split())
    assert not (run / "export").exists()
    assert not Path("-").exists()


@pytest.mark.parametrize("format", ["vectors", "faiss"])
def test_an_index_that_is_older_than_the_run(run: Path, format: str, capsys) -> None:
    passages = (run / "chunks.jsonl").read_text()
    (run / "chunks.jsonl").write_text(passages[: passages.rindex("{")])
    assert main(["export", str(run), "--format", format]) == 2
    said = capsys.readouterr().err
    assert "export: the index is older than the run (the passages changed); make it" in said
    (run / "chunks.jsonl").write_text(passages)
    shutil.copy(run / "tuned" / "model.safetensors", run / "model" / "model.safetensors")
    assert main(["export", str(run), "--format", format]) == 2
    assert "older than the run (the product encoder changed)" in capsys.readouterr().err
    assert not (run / "export").exists()


def test_what_exists_is_kept(run: Path, tmp_path: Path, capsys) -> None:
    export(run, "faiss")
    assert main(["export", str(run), "--format", "faiss"]) == 2
    assert "exists; give another, or add --overwrite." in capsys.readouterr().err
    assert main(["export", str(run), "--format", "faiss", "--overwrite", "--quiet"]) == 0
    assert main(["export", str(run), "--format", "vectors", "--out", str(tmp_path / "x.csv")]) == 2
    assert "--out must end in .parquet" in capsys.readouterr().err
    shutil.rmtree(run / "index")
    assert main(["export", str(run), "--format", "qdrant"]) == 2
    assert "has no index; make one: refine-fast index" in capsys.readouterr().err
