"""The index of a run and its search: exact, complete, and the same after any history of changes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from forked import fork

from refine_fast.cli import main
from refine_fast.errors import RefineFastError
from refine_fast.pipeline.commands.search import open_searcher, printable
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.corpus.bm25 import bm25_index
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import read_records
from refine_fast.pipeline.corpus.language import languages_of
from refine_fast.pipeline.corpus.sentences import sentence_spans
from refine_fast.pipeline.corpus.terms import search_terms
from refine_fast.pipeline.serving import ann, storage
from refine_fast.pipeline.serving import segment as segment_module
from refine_fast.pipeline.serving.blend import (
    best_places,
    standard,
)
from refine_fast.pipeline.serving.dense import Moments, rows_of_groups
from refine_fast.pipeline.serving.encoders import Encoders
from refine_fast.pipeline.serving.lexical import Lexical, Postings
from refine_fast.pipeline.serving.search import Index, Searcher

pytestmark = pytest.mark.usefixtures("one_thread")

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("text", "language", "sentences"),
    [
        (
            "Dr. Smith walked 3.5 km to the sea. Title\n\nHe swam there for two hours.",
            "en",
            ["Dr. Smith walked 3.5 km to the sea.", "Title\n\nHe swam there for two hours."],
        ),
        (
            "今日は天気がいいですね。元気ですか？",
            "ja",
            ["今日は天気がいいですね。", "元気ですか？"],
        ),
        ("Das ist z. B. ein Satz. Hier kommt noch einer.", "de", None),
        ("  one word  ", "en", ["one word"]),
        ("A whole sentence is here. End.", "en", ["A whole sentence is here. End."]),
        (" \n ", "en", []),
        ("", "en", []),
    ],
)
def test_sentences(text: str, language: str, sentences: list[str] | None) -> None:
    spans = sentence_spans(text, language)
    found = [text[start:end] for start, end in spans]
    if sentences is None:  # an abbreviation of German does not end a sentence
        assert found[0].startswith("Das ist z. B. ein")
    else:
        assert found == sentences
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert "".join("".join(found).split()) == "".join(text.split())


def test_languages_by_script() -> None:
    texts = ["plain English words", "日本語のテキスト", "中文的文本", "русский текст", "ไทย", "123"]
    assert languages_of(texts)[1:5] == ["ja", "zh", "ru", "th"]
    assert languages_of([]) == []


def test_rows_of_groups() -> None:
    rows, ends = rows_of_groups(np.array([0, 2, 3, 7]), np.array([2, 0]))
    assert rows.tolist() == [3, 4, 5, 6, 0, 1]
    assert ends.tolist() == [0, 4, 6]


def test_moments_give_the_mean_and_spread_of_every_score() -> None:
    vectors = RNG.standard_normal((500, 8), np.float32) + 1
    queries = RNG.standard_normal((3, 8), np.float32)
    kept, gone = vectors[:450], vectors[450:]
    moments = Moments.of(kept[:100]).plus(Moments.of(vectors[100:])).plus(Moments.of(gone), -1)
    scores = queries @ kept.T
    mean, spread = moments.standard(queries)
    np.testing.assert_allclose(mean, scores.mean(1), rtol=1e-5)
    np.testing.assert_allclose(spread, scores.std(1), rtol=1e-5)


TEXTS = [
    "the cat sat on the mat with another cat",
    "dogs chase cats around the house",
    "a house of cards",
    "the Loire is a river in France, and rivers flow",
    "",
    "日本語の文章です",
]


@pytest.mark.parametrize("query", ["cat house", "river river rivers", "unknown", "", "日本語"])
def test_bm25_has_bm25s_scores(query: str) -> None:
    peer = bm25_index(TEXTS)
    assert peer is not None
    (terms,) = search_terms([query])
    expected = peer.get_scores(terms) if terms else np.zeros(len(TEXTS))
    own = Lexical([Postings.of(TEXTS)], np.ones(len(TEXTS), bool)).scores(query)
    np.testing.assert_allclose(own, expected, rtol=1e-5)


@pytest.mark.parametrize("query", ["cat house", "river", "日本語"])
def test_bm25_of_parts_with_dead_passages_is_that_of_a_new_index(query: str) -> None:
    alive = np.array([True, False, True, True, True, False])
    parts = [Postings.of(TEXTS[:2]), Postings.of(TEXTS[2:])]
    kept = [text for text, lives in zip(TEXTS, alive, strict=True) if lives]
    expected = Lexical([Postings.of(kept)], np.ones(len(kept), bool)).scores(query)
    scores = Lexical(parts, alive).scores(query)
    np.testing.assert_allclose(scores[alive], expected, rtol=1e-6)
    assert not scores[~alive].any()


def test_standard_scores_with_the_zeros_left_out() -> None:
    scores = np.array([0, 3, 0, 1.0])
    expected = (scores - scores.mean()) / scores.std()
    np.testing.assert_allclose(standard(scores, 4), expected)
    assert not standard(np.zeros(3), 3).any()


def test_the_best_places_are_those_of_a_stable_sort() -> None:
    """Many ties, within the best k and at its edge."""
    scores = RNG.integers(0, 5, 200).astype(np.float32)
    for k in (1, 7, 60, 199, 200, 300):
        expected = np.argsort(-scores, kind="stable")[:k]
        np.testing.assert_array_equal(best_places(scores, k), expected)


@pytest.fixture
def run(indexed: Path, tmp_path: Path) -> Path:
    return shutil.copytree(indexed, tmp_path / "run")


def searcher(out: Path) -> Searcher:
    return open_searcher(out, Console(quiet=True))


def answers(out: Path, queries: list[str], k: int = 5) -> list[dict[str, list[tuple]]]:
    """Per query and system: ids, sentences and scores."""
    found = (searcher(out).search(query, k) for query in queries)
    return [
        {
            name: [(hit.chunk.id, hit.sentence, hit.score) for hit in hits]
            for name, hits in x.items()
        }
        for x in found
    ]


def assert_same(one: list, other: list) -> None:
    """Equal ids and sentences; scores up to rounding."""
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert [hit[:2] for hit in a[name]] == [hit[:2] for hit in b[name]], name
            np.testing.assert_allclose(
                [hit[2] for hit in a[name]], [hit[2] for hit in b[name]], rtol=1e-4, atol=1e-5
            )


QUERIES = ["how are operators called", "import statement", "zzz unknown", "<b>&\x1b[31m"]


def test_search_shows_each_system(indexed: Path, capsys) -> None:
    assert main(["search", str(indexed), QUERIES[0], "-k", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["systems"]) == {"base", "fused", "BM25", "blend"}
    chunks = {chunk.id: chunk for chunk in read_records(indexed / "chunks.jsonl", Chunk)}
    for hits in found["systems"].values():
        assert len(hits) == 3
        assert [hit["score"] for hit in hits] == sorted(
            (hit["score"] for hit in hits), reverse=True
        )
        for hit in hits:
            chunk = chunks[hit["id"]]
            assert (hit["text"], hit["source"]) == (chunk.text, chunk.source)
            start, end = hit["sentence"]["in_text"]
            assert hit["sentence"]["text"] == chunk.text[start:end]
            first = hit["sentence"]["in_source"][0]
            assert first == chunk.start + start
    assert main(["search", str(indexed), QUERIES[0]]) == 0
    assert found["systems"]["blend"][0]["id"] in capsys.readouterr().out
    assert main(["search", str(indexed), "op\udce9rateurs", "--json"]) == 0  # not UTF-8
    assert json.loads(capsys.readouterr().out)["query"] == "op\ufffdrateurs"
    assert main(["search", str(indexed), " "]) == 2
    assert "search: the query is empty" in capsys.readouterr().err


def test_what_search_prints(indexed: Path, capsys) -> None:
    """Texts as they are, brackets included, and no markup of ours."""
    assert main(["search", str(indexed), QUERIES[0]]) == 0
    shown = capsys.readouterr().out
    assert not re.search(r"\[/?dim\]|\[/?bold|\\\[", shown)
    assert re.search(r"characters\s+\d+\s+to\s+\d+", shown)


def test_a_run_that_moved_without_its_documents(run: Path, tmp_path: Path, capsys) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    gone = str(tmp_path / "gone")
    config |= {"docs": gone, "out": gone, "ood": [gone]}
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["search", str(run), QUERIES[0], "--quiet"]) == 0
    assert main(["index", str(run)]) == 0
    assert "index: up to date" in capsys.readouterr().err
    assert main(["export", str(run), "--format", "triplets", "-o", str(tmp_path / "t.jsonl")]) == 0


def test_ids_with_a_hash_are_documents_of_their_own(run: Path, tmp_path: Path) -> None:
    """Such as issues, or anchors of a page: one that is replaced takes no other along."""
    rows = tmp_path / "issues.jsonl"

    def add(*numbers: int, text: str) -> list[str]:
        lines = [{"id": f"repo#{n}", "text": f"{text} of issue number {n}"} for n in numbers]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert main(["index", str(run), "--add", str(rows), "--quiet"]) == 0
        index = searcher(run).index
        alive = (index.chunk(int(row)) for row in np.flatnonzero(index.alive))
        return sorted(chunk.text for chunk in alive if chunk.id.startswith("repo#"))

    assert add(11, 12, 13, text="Old words") == [
        f"Old words of issue number {n}" for n in (11, 12, 13)
    ]
    assert add(12, text="New words") == [
        "New words of issue number 12",
        "Old words of issue number 11",
        "Old words of issue number 13",
    ]


def test_a_file_of_the_runs_own_folder_keeps_its_name(run: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "docs" / "sub" / "a.md").write_text("Only this text has zebras.")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["docs"] = str(tmp_path / "docs")
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert main(["index", str(run), "--add", str(tmp_path / "docs" / "sub" / "a.md")]) == 0
    assert "0 documents are replaced, 1 are new" in capsys.readouterr().err
    assert searcher(run).search("zebras", 1)["BM25"][0].chunk.id == "sub/a.md"


def test_the_columns_are_what_each_system_ranks(indexed: Path) -> None:
    """Over every passage, with numpy alone."""
    own = searcher(indexed)
    index, query = own.index, QUERIES[0]
    found = own.search(query, 5)
    (segment,) = index.segments
    for side, name in (("product", "fused"), ("base", "base")):
        scores = segment.vectors[side] @ own._encoders.queries(side, [query])[0]
        best = np.argsort(-scores, kind="stable")[:5]
        assert [hit.chunk.id for hit in found[name]] == [index.chunk(int(i)).id for i in best]
        np.testing.assert_allclose([hit.score for hit in found[name]], scores[best], rtol=1e-4)


def test_an_approximate_index_finds_nearly_the_same(run: Path, capsys) -> None:
    exact = answers(run, QUERIES[:2])
    assert main(["index", str(run), "--type", "sq8", "--quiet"]) == 0
    assert list((run / "index").glob("*/sentences.faiss"))
    assert_same(answers(run, QUERIES[:2]), exact)  # all lists are searched where there are few
    assert main(["index", str(run), "--remove", "nobody"]) == 2  # the kind is kept
    assert "no document 'nobody'" in capsys.readouterr().err


def test_a_new_index_only_where_something_changed(run: Path, capsys) -> None:
    (run / "model" / "README.md").write_text("Scores on another set.")  # as a new report writes it
    assert main(["index", str(run)]) == 0
    assert "index: up to date" in capsys.readouterr().err
    shutil.copy(run / "tuned" / "model.safetensors", run / "model" / "model.safetensors")
    assert main(["search", str(run), "x"]) == 2
    assert "the index is older than the run (the product encoder changed)" in (
        capsys.readouterr().err
    )
    assert main(["index", str(run)]) == 0
    assert "index: the product encoder changed" in capsys.readouterr().err
    passages = (run / "chunks.jsonl").read_text()
    (run / "chunks.jsonl").write_text(passages[: passages.rindex("{")])
    assert main(["search", str(run), "x"]) == 2
    assert "the index is older than the run (the passages changed)" in capsys.readouterr().err
    (run / "chunks.jsonl").write_text(passages)
    assert main(["search", str(run), "x", "--quiet"]) == 0


@pytest.fixture
def more(tmp_path: Path) -> Path:
    folder = tmp_path / "more"
    folder.mkdir()
    (folder / "new.md").write_text("# Loire\n\nThe Loire is the longest river of France.")
    return folder


def test_changes_leave_the_index_that_a_rebuild_makes(run: Path, more: Path, capsys) -> None:
    """Added, changed and removed documents: no trace of the old ones, statistics included."""
    queries = [*QUERIES, "the longest river of France"]
    ids = [chunk.id.partition("#")[0] for chunk in read_records(run / "chunks.jsonl", Chunk)]
    gone, changed = ids[0], ids[-1]
    (more / changed).write_text("Another text about operators stands here now.")
    assert main(["index", str(run), "--add", str(more), "--remove", gone, "--quiet"]) == 0
    found = answers(run, queries)
    assert found[-1]["blend"][0][0] == "new.md"
    seen = {hit[0].partition("#")[0] for x in answers(run, queries, 500) for hit in x["fused"]}
    assert gone not in seen
    assert {changed, "new.md"} < seen
    manifest = json.loads((run / "index" / "index.json").read_text())
    assert sorted(manifest["edited"]) == sorted({gone, changed, "new.md"})

    manifest["key"] = {}  # as if a setting had changed
    (run / "index" / "index.json").write_text(json.dumps(manifest))
    blend = manifest["blend"]
    assert main(["index", str(run), "--quiet"]) == 0
    rebuilt = json.loads((run / "index" / "index.json").read_text())
    assert rebuilt["dead"] is None
    rebuilt["blend"] = blend  # chosen anew
    (run / "index" / "index.json").write_text(json.dumps(rebuilt))
    assert_same(answers(run, queries), found)
    assert main(["index", str(run), "--remove", "nobody"]) == 2
    assert "no document 'nobody' is in the index" in capsys.readouterr().err


def test_many_additions_are_merged(run: Path, more: Path) -> None:
    queries = [*QUERIES, "river number 7"]
    for number in range(10):
        (more / "new.md").write_text(f"The river number {number} flows. It is long and wide.")
        if number == 9:
            (more / "other.md").write_text("The other river is deep.")
        assert main(["index", str(run), "--add", str(more), "--quiet"]) == 0
        segments = json.loads((run / "index" / "index.json").read_text())["segments"]
        assert len(segments) == 2  # what was replaced takes no place
    hits = searcher(run).search("the other river", 500)["fused"]
    assert [hit.chunk.text for hit in hits if hit.chunk.id == "new.md"] == [
        "The river number 9 flows. It is long and wide."
    ]
    assert "other.md" in [hit.chunk.id for hit in hits]
    assert len(answers(run, queries)) == len(queries)


@pytest.mark.parametrize("delay", [0.0, 0.1])
def test_a_killed_writer_leaves_the_old_index_or_the_new(
    run: Path, more: Path, delay: float
) -> None:
    """SIGKILL after the first file of the new segment, and a little later."""
    before = answers(run, QUERIES)
    old = set(os.listdir(run / "index"))
    process = fork(main, ["index", str(run), "--add", str(more), "--quiet"])
    while set(os.listdir(run / "index")) == old and process.is_alive():
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join()
    found = searcher(run).search("the longest river of France", 500)["fused"]
    if "new.md" not in [hit.chunk.id for hit in found]:
        assert_same(answers(run, QUERIES), before)
    assert main(["index", str(run), "--add", str(more), "--quiet"]) == 0
    manifest = json.loads((run / "index" / "index.json").read_text())
    kept = {"index.json", manifest["dead"], *manifest["segments"]} - {None}
    assert set(os.listdir(run / "index")) == kept


KILLED_IN = {
    "faiss file": (ann, "save"),
    "facts of the segment": (segment_module, "write_json"),
    "segment on the disk": (storage, "fsync_all"),
    "index.json": (storage, "write_json"),
}


def _killed(arguments: list[str], moment: str) -> None:
    """The command line in a process that kills itself; a faiss file is cut before."""

    def die(*given: object) -> None:
        if moment == "faiss file":
            Path(str(given[1])).write_bytes(b"IwSq")
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(*KILLED_IN[moment], die)
    main([*arguments, "--quiet"])


@pytest.mark.parametrize(
    ("change", "moment"),
    [
        ("--type", "faiss file"),
        ("--type", "index.json"),
        ("--add", "facts of the segment"),
        ("--add", "segment on the disk"),
        ("--add", "index.json"),
    ],
)
def test_a_kill_at_each_step_leaves_the_old_index(
    run: Path, more: Path, change: str, moment: str
) -> None:
    """A new index with faiss files, and an added document that also replaces one; the same command
    then succeeds and leaves nothing of the killed one."""
    replaced = read_records(run / "chunks.jsonl", Chunk)[0].id.partition("#")[0]
    (more / replaced).write_text("Another text about operators.")
    before = answers(run, QUERIES[:2])
    manifest = (run / "index" / "index.json").read_bytes()
    arguments = ["index", str(run), change, "sq8" if change == "--type" else str(more)]
    process = fork(_killed, arguments, moment)
    process.join(600)  # a busy machine takes minutes
    assert process.exitcode == -signal.SIGKILL
    assert (run / "index" / "index.json").read_bytes() == manifest
    assert len(os.listdir(run / "index")) > 2  # what the killed writer left
    assert_same(answers(run, QUERIES[:2]), before)

    assert main([*arguments, "--quiet"]) == 0
    after = json.loads((run / "index" / "index.json").read_text())
    kept = {"index.json", after["dead"], *after["segments"]} - {None}
    assert set(os.listdir(run / "index")) == kept
    assert list((run / "index").glob("*/*.faiss")) or change == "--add"


def test_an_index_that_is_replaced_while_it_is_opened_is_opened_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a writer had committed, and deleted files, after index.json was read."""
    folder, opens = storage.IndexFolder(run), vars(Index)["open"]
    before = (run / "index" / "index.json").read_bytes()

    def opened(_: type[Index], where: storage.IndexFolder, manifest: storage.Manifest) -> Index:
        monkeypatch.setattr(Index, "open", opens)
        folder.commit(replace(manifest, edited={**manifest.edited, "x": None}))
        raise RefineFastError("index: s1 is damaged (FileNotFoundError)")

    monkeypatch.setattr(Index, "open", classmethod(opened))
    searcher = Searcher(run, Encoders({}))
    assert "x" in searcher.manifest.edited
    (run / "index" / "index.json").write_bytes(before)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"[]", None])
def test_a_damaged_index_is_named(run: Path, capsys, content: bytes | None) -> None:
    """Whichever of its files is cut, overwritten or missing, in one sentence."""
    folder = run / "index" / "s1"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content or whole[: len(whole) // 2])
        assert main(["search", str(run), "how are operators called"]) == 2, path
        said = capsys.readouterr().err
        assert f"index: {folder} is damaged (" in said
        assert f"; delete {folder.parent}, run refine-fast index {run}," in said
        path.write_bytes(whole)
    whole = (folder / "product.npy").read_bytes()
    (folder / "product.npy").write_bytes(whole[: len(whole) // 2])
    for command in (["index", str(run)], ["export", str(run), "--format", "vectors"]):
        assert main(command) == 2
        assert f"index: {folder} is damaged (" in capsys.readouterr().err
    assert not (run / "export").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\0", b"[]", b'{"format": 1'])
def test_an_index_without_its_first_file_is_no_index(run: Path, capsys, content: bytes) -> None:
    (run / "index" / "index.json").write_bytes(content)
    assert main(["search", str(run), "how are operators called"]) == 2
    assert f"refine-fast index {run}" in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[31m\u202eb\x07") == "a [31m b "
