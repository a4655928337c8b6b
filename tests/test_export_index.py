"""The index in the formats of other servers, each loaded by its own library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from refine_fast.cli import INDEX_FORMATS, main
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import read_records
from refine_fast.pipeline.serving.exports import WRITERS

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
