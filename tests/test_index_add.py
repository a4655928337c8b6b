"""``refine-fast index --add`` on a finished run: which documents are read, what they are called,
and what becomes of the queries about those that they replace."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml

from refine_fast.cli import main
from refine_fast.pipeline.commands.index import held_out_queries
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import read_records
from refine_fast.pipeline.queries.query import Query
from refine_fast.pipeline.serving.search import open_index

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(indexed: Path, tmp_path: Path) -> Path:
    """Its documents' folder is ``docs`` beside it, which is empty by now."""
    (tmp_path / "docs").mkdir()
    out = shutil.copytree(indexed, tmp_path / "run")
    configure(out, docs=str(tmp_path / "docs"))
    return out


def configure(out: Path, **values: str) -> None:
    config = yaml.safe_load((out / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump({**config, **values}, sort_keys=False))


def write_rows(path: Path, texts: Mapping[str, str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": id, "text": text} for id, text in texts.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def add(out: Path, path: Path) -> dict[str, str]:
    """Adds documents; returns id -> text of the passages of tables, and of those about zebras."""
    assert main(["index", str(out), "--add", str(path), "--quiet"]) == 0
    _, index = open_index(out)
    chunks = (index.chunk(int(row)) for row in np.flatnonzero(index.alive))
    return {
        chunk.id: chunk.text
        for chunk in chunks
        if ".jsonl" in chunk.source or "zebra" in chunk.text
    }


@pytest.mark.filterwarnings("ignore:.*have the id of another file:UserWarning")
@pytest.mark.parametrize("folder", ["docs", "more"])
def test_one_file_of_a_folder_replaces_its_own_rows_alone(
    run: Path, tmp_path: Path, folder: str
) -> None:
    """Its files repeat ids; it is the run's own folder, or one that was added as a whole."""
    a = write_rows(tmp_path / folder / "a.jsonl", {"1": "one of a", "2": "two of a"})
    b = write_rows(tmp_path / folder / "b.jsonl", {"1": "one of b", "3": "three of b"})
    expected = {"1": "one of a", "2": "two of a", "b.jsonl:1": "one of b", "3": "three of b"}
    assert add(run, tmp_path / folder) == expected
    write_rows(b, {"1": "one of b anew", "3": "three of b"})
    expected["b.jsonl:1"] = "one of b anew"
    assert add(run, b) == expected
    write_rows(a, {"1": "one of a anew"})
    expected["1"] = "one of a anew"
    assert add(run, a) == add(run, tmp_path / folder) == expected


@pytest.mark.filterwarnings("ignore:.*have the id of another file:UserWarning")
def test_a_new_file_of_the_runs_folder_takes_no_ids_of_others(run: Path, tmp_path: Path) -> None:
    """Nor when the whole folder is read again and the new file comes first."""
    docs = tmp_path / "docs"
    b = write_rows(docs / "b.jsonl", {"1": "one of b"})
    assert add(run, b) == {"1": "one of b"}
    a = write_rows(docs / "a.jsonl", {"1": "one of a"})
    expected = {"1": "one of b", "a.jsonl:1": "one of a"}
    for path in (a, docs):
        assert add(run, path) == expected


def test_a_renamed_file_of_the_runs_folder_replaces_its_rows(run: Path, tmp_path: Path) -> None:
    before = write_rows(tmp_path / "docs" / "b: may.jsonl", {"1": "one of b"})
    assert add(run, before) == {"1": "one of b"}
    after = before.rename(before.with_name("b: june.jsonl"))
    assert add(run, after) == {"1": "one of b"}
    write_rows(after, {"1": "one of b anew"})
    assert add(run, after) == {"1": "one of b anew"}


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_row_that_moved_to_another_file_is_one_document(
    run: Path, tmp_path: Path, everything: bool, first: bool
) -> None:
    """Its old file is still there. The new one is read alone or with all, before that or after."""
    docs = tmp_path / "docs"
    old = write_rows(docs / "m.jsonl", {"1": "one", "2": "two"})
    expected = {"1": "one", "2": "two"}
    assert add(run, docs) == expected
    write_rows(old, {"1": "one"})
    moved = write_rows(docs / ("a.jsonl" if first else "z.jsonl"), {"2": "two", "3": "three"})
    for _ in range(2):
        assert add(run, docs if everything else moved) == {**expected, "3": "three"}


@pytest.mark.filterwarnings("ignore:.*have the id of another file:UserWarning")
def test_a_folder_around_the_runs_folder_keeps_the_names_of_its_files(
    run: Path, tmp_path: Path
) -> None:
    """Others there take neither their names nor their ids."""
    parent = tmp_path / "docs"
    docs = parent / "of" / "run"
    configure(run, docs=str(docs))
    write_rows(docs / "a.jsonl", {"1": "one"})
    (docs / "b.md").write_text("A zebra has stripes.")
    expected = {"1": "one", "b.md": "A zebra has stripes."}
    assert add(run, docs) == expected
    write_rows(parent / "a.jsonl", {"1": "another one", "2": "two"})
    (parent / "of" / "b.md").write_text("Another zebra.")
    others = {"../../a.jsonl:1": "another one", "2": "two", "../b.md": "Another zebra."}
    for path in (parent, parent, docs, docs.parent):
        assert add(run, path) == expected | others


def test_a_folder_around_the_runs_one_file_keeps_the_name_of_it(run: Path, tmp_path: Path) -> None:
    docs = tmp_path / "docs" / "rows.jsonl"
    configure(run, docs=str(docs))
    docs.write_text(json.dumps({"text": "A zebra has stripes."}) + "\n")
    for path in (docs, docs.parent, tmp_path / "docs"):
        assert add(run, path) == {"rows.jsonl:1": "A zebra has stripes."}


def test_a_file_from_elsewhere_replaces_by_id_and_says_whose(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(run, write_rows(tmp_path / "docs" / "a.jsonl", {"1": "one", "2": "two"}))
    news = write_rows(tmp_path / "news.jsonl", {"2": "two anew"})
    assert main(["index", str(run), "--add", str(news)]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "1 documents replace those with the same id of other files, the first" in said
    assert "news.jsonl:1 that of a.jsonl:2; give them other ids to keep both" in said
    assert add(run, news) == {"1": "one", "2": "two anew"}


def test_the_runs_folder_and_its_queries_are_no_documents(run: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    more.mkdir()
    out = run.rename(more / "run")
    (more / "new.txt").write_text("A zebra has stripes.")
    queries = more / "asked.jsonl"
    queries.write_text(json.dumps({"text": "what has stripes?", "doc_id": "new.txt"}) + "\n")
    configure(out, queries=str(queries))
    assert add(out, more) == {"new.txt": "A zebra has stripes."}


def test_the_advice_about_another_type_leads_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.txt").write_text("A zebra has stripes.")
    command = ["index", str(run), "--add", str(tmp_path / "new.txt"), "--type", "hnsw", "--quiet"]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"make it first: refine-fast index {run} --type hnsw." in said
    assert main(["index", str(run), "--type", "hnsw", "--quiet"]) == 0
    assert main(command) == 0


def test_queries_about_a_document_that_changed_do_not_count(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither for the blend, after a change or in a new index, nor for the loss of an export."""
    chunks = read_records(run / "chunks.jsonl", Chunk)
    dev, held_out = (read_records(run / f"{name}.jsonl", Query) for name in ("dev", "held_out"))
    sources = {chunk.id: chunk.source for chunk in chunks}
    edited = {sources[dev[0].chunk_id], sources[held_out[0].chunk_id]}
    for source in edited:
        own = [chunk.text for chunk in chunks if chunk.source == source]
        # of as many chunks, so that their ids are there
        (tmp_path / "docs" / source).write_text("\n\n".join(f"Zebra. {text}" for text in own))
    add(run, tmp_path / "docs")
    capsys.readouterr()

    def kept(queries: list[Query]) -> list[Query]:
        return [query for query in queries if sources[query.chunk_id] not in edited]

    _, index = open_index(run)
    assert held_out_queries(run, Console(quiet=True), chunks, index.texts) == kept(dev)
    lost = len(dev) - len(kept(dev))
    news = f"{lost} held-out queries do not count: their passages have changed or are gone"
    for key in ({}, {"key": {}}):  # as it is, and as if a setting had changed
        manifest = json.loads((run / "index" / "index.json").read_text())
        (run / "index" / "index.json").write_text(json.dumps(manifest | key))
        assert main(["index", str(run), "--json"]) == 0
        captured = capsys.readouterr()
        assert news in " ".join(captured.err.split())
        assert json.loads(captured.out)["blend"]["queries"] <= len({x.text for x in kept(dev)})

    command = ["export", str(run), "--format", "vectors", "--dims", "24", "--json"]
    assert main(command) == 0
    captured = capsys.readouterr()
    asked = {query.text for query in (*kept(dev), *kept(held_out))}
    assert json.loads(captured.out)["loss"]["queries"] == len(asked)
    assert "held-out queries do not count" in " ".join(captured.err.split())
