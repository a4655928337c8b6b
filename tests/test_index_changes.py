"""Documents that are added to an index, replaced in it and removed from it, without an encoder."""

from __future__ import annotations

import errno
import json
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from refine_fast.errors import RefineFastError
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.sentences import sentence_texts
from refine_fast.pipeline.progress import Progress
from refine_fast.pipeline.queries.query import Query
from refine_fast.pipeline.serving import build
from refine_fast.pipeline.serving.build import Builder
from refine_fast.pipeline.serving.encoders import Encoders, Side
from refine_fast.pipeline.serving.judged import Texts
from refine_fast.pipeline.serving.search import Index, Searcher
from refine_fast.pipeline.serving.segment import Segment
from refine_fast.pipeline.serving.storage import IndexFolder


@dataclass(frozen=True)
class Random(Encoders):
    """Vectors by the texts' checksums."""

    def documents(
        self,
        side: Side,
        texts: Sequence[str],
        *,
        out: Path | None = None,
        progress: Progress | None = None,
    ) -> np.ndarray:
        seeds = (zlib.crc32(text.encode()) for text in texts)
        vectors = [np.random.default_rng(seed).standard_normal(8, np.float32) for seed in seeds]
        if out is not None:
            np.save(out, np.stack(vectors))
        return np.stack(vectors)


def no_queries(_: Texts) -> list[Query]:
    return []


@contextmanager
def silent(_: str) -> Iterator[Progress]:
    yield lambda done, total: None


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def builder(tmp_path: Path, said: list[str]) -> Builder:
    return Builder(IndexFolder(tmp_path), Random({"product": tmp_path}), silent, said.append)


def document(id: str, *texts: str) -> list[Chunk]:
    """The chunks of a document with these parts."""
    ids = [f"{id}#{number}" for number in range(len(texts))] if len(texts) > 1 else [id]
    starts = np.cumsum([0, *(len(text) + 1 for text in texts)]).tolist()
    return [
        Chunk(own, text, "", id, start, start + len(text))
        for own, text, start in zip(ids, texts, starts, strict=False)
    ]


def live(builder: Builder) -> dict[str, str]:
    """Chunk id -> text, of what can be found; and it has the vectors of its texts."""
    manifest = builder.folder.manifest()
    assert manifest is not None
    index = Index.open(builder.folder, manifest)
    rows = np.flatnonzero(index.alive)
    chunks = [index.chunk(int(row)) for row in rows]
    vectors = np.concatenate([segment.vectors["product"] for segment in index.segments])[rows]
    expected = builder.encoders.documents("product", [chunk.passage for chunk in chunks])
    np.testing.assert_array_equal(vectors, expected)
    for row, chunk in zip(rows.tolist(), chunks, strict=True):
        segment, place = index._place(row)
        texts = sentence_texts([chunk], [segment.sentences(place)])
        own = segment.vectors["sentences"][slice(*segment.offsets[place : place + 2])]
        np.testing.assert_array_equal(own, builder.encoders.documents("product", texts))
    found = {chunk.id: chunk.text for chunk in chunks}
    assert len(found) == len(chunks)
    return found


@dataclass(frozen=True)
class Searched(Random):
    """Also encodes queries."""

    def queries(self, side: Side, texts: Sequence[str]) -> np.ndarray:
        return self.documents(side, texts)


def test_an_open_index_sees_a_document_that_was_removed_and_added_anew(tmp_path: Path) -> None:
    """The segment has the number of the removed one, and index.json says the same as before."""
    encoders = Searched({"product": tmp_path})
    builder = Builder(IndexFolder(tmp_path), encoders, silent, print)
    built = builder.build(document("a", "one") + document("b", "two"), no_queries, {})
    first = builder.change(built, document("x", "a xylophone"), ["x"], [])
    searcher = Searcher(tmp_path, encoders)
    assert [hit.chunk.text for hit in searcher.search("xylophone")["BM25"]] == ["a xylophone"]
    removed = builder.change(first, [], [], ["x"])
    again = builder.change(removed, document("x", "another xylophone"), ["x"], [])
    assert again == first
    searcher.refresh()
    assert [hit.chunk.text for hit in searcher.search("xylophone")["BM25"]] == ["another xylophone"]


def test_what_a_kill_left_is_gone_before_the_disk_is_needed(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = builder.build(document("a", "one"), no_queries, {})
    left = builder.folder.path / "s7"

    def full(*_: object, **options: object) -> np.ndarray:
        assert not left.exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Random, "documents", full)
    changes = (
        lambda: builder.build(document("a", "two"), no_queries, {}),
        lambda: builder.change(manifest, document("b", "two"), ["b"], []),
    )
    for change in changes:
        left.mkdir()
        with pytest.raises(OSError, match="No space left"):
            change()
        assert {item.name for item in builder.folder.path.iterdir()} == {"index.json", "s1"}


def kinds(builder: Builder) -> list[str]:
    """Of the passage indexes of every segment."""
    manifest = builder.folder.manifest()
    assert manifest is not None
    facts = [
        json.loads((builder.folder.path / name / "segment.json").read_text())
        for name in manifest.segments
    ]
    return [about["indexes"]["product"]["kind"] for about in facts]


def test_added_documents_get_the_kind_of_index_that_was_asked_for(builder: Builder) -> None:
    manifest = builder.build(document("a", "first", "second"), no_queries, {}, "hnsw")
    for number in range(10):  # some of them are merged
        added = document(f"b{number}", f"text {number}")
        manifest = builder.change(manifest, added, [added[0].id], [], "hnsw")
        assert set(kinds(builder)) == {"hnsw"}
    assert len(live(builder)) == 12


def test_an_id_with_a_number_sign_is_no_part_of_another_document(builder: Builder) -> None:
    """And the parts of a document are, also where the first is gone as a duplicate."""
    issues = [document(f"INC#{number}", f"issue {number}")[0] for number in (0, 7, 1001)]
    pages = [*document("page", "a template", "one", "two")[1:], *document("other", "x")]
    manifest = builder.build([*issues[1:], *pages], no_queries, {})
    with pytest.raises(RefineFastError, match=r"'INC' is in the index; .* such as 'INC#7'"):
        builder.change(manifest, [], [], ["INC"])
    manifest = builder.change(manifest, document("INC#7", "changed"), ["INC#7"], [])
    manifest = builder.change(manifest, issues[:1], ["INC#0"], ["page"])
    expected = {"INC#0": "issue 0", "INC#7": "changed", "INC#1001": "issue 1001", "other": "x"}
    assert live(builder) == expected
    builder.build([*issues[1:], *pages], no_queries, {})
    assert live(builder) == expected


def test_how_many_documents_are_replaced_is_said(builder: Builder, said: list[str]) -> None:
    manifest = builder.build(
        [*document("a", "one", "two"), *document("b", "three")], no_queries, {}
    )
    added = [*document("a", "other"), *document("c", "new"), *document("d", "new too")]
    builder.change(manifest, added, ["a", "c", "d"], ["b"])
    assert said == ["1 documents are replaced, 2 are new"]


def test_the_run_counts_again_where_it_changed(builder: Builder, said: list[str]) -> None:
    """Its documents that were replaced, removed, or added before it had them; not for a cut."""
    run = [*document("a", "one", "two"), *document("b", "three"), *document("c", "four")]
    own, new = document("a", "edited"), document("n", "new", "and newer")
    manifest = builder.build(run, no_queries, {})
    manifest = builder.change(manifest, [*own, *new], ["a", "n"], ["b"])
    builder.change(manifest, own, ["a"], [])  # once more
    edited = {"a": "edited", "n#0": "new", "n#1": "and newer", "c": "four"}
    said.clear()
    builder.build([*document("a", "one - two"), *run[2:]], no_queries, {})
    assert live(builder) == edited
    assert said == []

    changed = [*document("a", "one", "three"), *document("b", "three"), *document("c", "five")]
    builder.build(changed, no_queries, {})
    assert live(builder) == {
        "a#0": "one",
        "a#1": "three",
        "c": "five",
        "n#0": "new",
        "n#1": "and newer",
    }
    assert len(said) == 1
    assert said[0].endswith("for 1 documents, because they changed in the run: 'a'")
    builder.build([*document("b", "six"), *document("n", "of the run")], no_queries, {})
    assert live(builder) == {"b": "six", "n": "of the run"}
    assert said[1].endswith("for 2 documents, because they changed in the run: 'b', 'n'")


def test_an_index_in_which_every_document_was_replaced_is_built_anew(builder: Builder) -> None:
    """More than once: what was added is then its first segment."""
    run = document("a", "one")
    manifest = builder.build(run, no_queries, {})
    builder.change(manifest, document("a", "edited"), ["a"], [])
    for _ in range(2):
        manifest = builder.build(run, no_queries, {})
        assert live(builder) == {"a": "edited"}
    manifest = builder.change(manifest, document("a", "again"), ["a"], [])
    builder.change(manifest, document("b", "new"), ["b"], [])
    builder.build(run, no_queries, {})
    assert live(builder) == {"a": "again", "b": "new"}
    builder.build(document("a", "three"), no_queries, {})
    assert live(builder) == {"a": "three", "b": "new"}


def test_an_index_that_would_have_no_passage_is_not_built(builder: Builder) -> None:
    run = [*document("a", "one"), *document("b", "two")]
    builder.change(builder.build(run, no_queries, {}), [], [], ["a"])
    with pytest.raises(RefineFastError, match=r"no passage is left, .*; delete .*/index to have"):
        builder.build(run[:1], no_queries, {})


def test_an_open_index_goes_on_with_a_new_one_of_the_same_encoders(tmp_path: Path) -> None:
    encoders = Searched({"product": tmp_path})
    builder = Builder(IndexFolder(tmp_path), encoders, silent, print)
    key = {"the product encoder": "1", "the code": {}, "the passages": "1", "--type": "auto"}
    builder.build(document("a", "one"), no_queries, key)
    searcher = Searcher(tmp_path, encoders)
    builder.build(document("b", "a xylophone"), no_queries, {**key, "the passages": "2"})
    searcher.refresh()
    assert [hit.chunk.id for hit in searcher.search("xylophone")["BM25"]] == ["b"]
    for changed in ("the product encoder", "the base encoder", "the code"):
        builder.build(document("c", "another"), no_queries, {**key, changed: "2"})
        with pytest.raises(RefineFastError, match=rf"rebuilt \({changed} changed\); start"):
            searcher.refresh()
    shutil.rmtree(builder.folder.path)
    searcher.refresh()
    assert searcher.index.count == 1


def test_an_index_without_the_digests_of_its_changes(builder: Builder, said: list[str]) -> None:
    """As earlier versions wrote it: the changes stay, until the run changes from now on."""
    run = [*document("a", "one"), *document("b", "two")]
    manifest = builder.build(run, no_queries, {})
    builder.change(manifest, document("a", "edited"), ["a"], [])
    path = builder.folder.path / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "edited": ["a"]}))
    said.clear()
    builder.build(run, no_queries, {})
    builder.build(run, no_queries, {})
    assert live(builder) == {"a": "edited", "b": "two"}
    assert said == []
    builder.build([*document("a", "three"), *document("b", "two")], no_queries, {})
    assert live(builder) == {"a": "three", "b": "two"}


def test_a_large_addition_is_not_copied_for_small_ones(
    builder: Builder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few segments stay, and what many small additions copy grows with n log n; in small tiles."""
    monkeypatch.setattr(build, "TILE_ROWS", 3)
    written = []
    merge = build._merge

    def counted(parts: Sequence[tuple[Segment, np.ndarray]], folder: Path) -> None:
        written.append(sum(len(rows) for _, rows in parts))
        merge(parts, folder)

    monkeypatch.setattr(build, "_merge", counted)
    manifest = builder.build([*document("a", "one"), *document("b", "two")], no_queries, {})
    large = document("large", *(f"part {number}. And its end." for number in range(20)))
    manifest = builder.change(manifest, large, ["large"], ["b"])
    expected = {"a": "one"} | {chunk.id: chunk.text for chunk in large}
    for number in range(16):
        added = document(f"d{number}", f"text {number}. More.")
        manifest = builder.change(manifest, added, [added[0].id], [])
        expected[added[0].id] = added[0].text
        assert len(manifest.segments) <= 2 + np.log2(number + 2)
    assert live(builder) == expected
    copied = sum(written)
    assert 0 < copied <= 16 * np.log2(16)
    manifest = builder.change(manifest, [], [], [f"d{number}" for number in range(16)])
    assert len(manifest.segments) == 2
    assert sum(written) == copied
    assert len(live(builder)) == 21
