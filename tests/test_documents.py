"""Documents in, chunks out: every format, every offset, every bad file by name."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from document_files import bad_folder, pdf
from retrieval_sets import SMALL, folder_of

from refine_fast.errors import RefineFastError, RefineFastWarning
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.chunking import chunk_documents
from refine_fast.pipeline.corpus.dedup import Duplicates, deduplicate
from refine_fast.pipeline.corpus.documents import Document, Reading, load_documents
from refine_fast.pipeline.corpus.jsonl import read_records, write_records

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")

RIVERS = ["Oder", "Elbe", "Main"] * 20
SENTENCES = [
    f"Sentence number {n} tells of the river {name}, which is {n * 7} miles long."
    for n, name in enumerate(RIVERS)
]
MARKDOWN = (
    f"# Rivers\n\n{' '.join(SENTENCES[:20])}\n\n## Lakes and ponds\n\n{' '.join(SENTENCES[20:40])}"
    "\n\n```\n# no heading\n```\n"
)


@pytest.fixture(scope="module")
def tokenizer(minilm: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm)


def test_folder_of_every_format(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rivers.md").write_bytes(MARKDOWN.encode())
    (tmp_path / "a_plain-file.txt").write_bytes(
        ("\ufeff" + "\r\n\r\n".join(SENTENCES) + "\r\n").encode()
    )
    html = (
        "<html><head><title>The Alps</title><style>p{}</style></head><body><nav>Home</nav>"
        "<!-- no --><h1>Peaks</h1>"
        "<p>Mont Blanc is\n 4,806 <b>metres</b>\thigh.</p>"
        "<h2>Code</h2><pre># a\n  b</pre></pre><table><tr><td>x</td><td>y</td></tr></table>"
        "</body></html>"
    )
    (tmp_path / "alps.html").write_text(html)
    (tmp_path / "z.PDF").write_bytes(pdf("The glacier feeds the river."))
    (tmp_path / ".hidden.txt").write_text("never read")

    documents = load_documents(tmp_path)
    by_id = {document.id: document for document in documents}
    assert list(by_id) == ["a_plain-file.txt", "alps.html", "z.PDF", "sub/rivers.md"]
    assert all(document.source == document.id for document in documents)
    assert by_id["a_plain-file.txt"].text == (tmp_path / "a_plain-file.txt").read_bytes().decode(
        "utf-8-sig"
    )
    assert by_id["a_plain-file.txt"].title == "a plain file"
    assert by_id["sub/rivers.md"].text == MARKDOWN
    assert by_id["sub/rivers.md"].title == "Rivers"
    assert by_id["alps.html"].title == "The Alps"
    assert (
        by_id["alps.html"].text
        == "# Peaks\n\nMont Blanc is 4,806 metres high.\n\n## Code\n\n```\n# a\n  b\n```\n\nx y"
    )
    assert by_id["z.PDF"].text == "The glacier feeds the river."

    chunks = chunk_documents(documents, tokenizer, max_tokens=128)
    assert len({chunk.id for chunk in chunks}) == len(chunks) > 10
    for chunk in chunks:
        assert chunk.text == by_id[chunk.source].text[chunk.start : chunk.end]
        assert chunk.text == chunk.text.strip()
        assert len(tokenizer(chunk.passage)["input_ids"]) <= 128
    assert {chunk.title for chunk in chunks if chunk.source == "alps.html"} <= {
        "The Alps",
        "The Alps: Peaks",
        "The Alps: Code",
    }
    for document in documents:  # nothing but blanks is left out
        ends = sorted((chunk.start, chunk.end) for chunk in chunks if chunk.source == document.id)
        edges = [0, *(edge for pair in ends for edge in pair), len(document.text)]
        assert not any(
            document.text[edges[i] : edges[i + 1]].strip() for i in range(0, len(edges), 2)
        )
    titles = [chunk.title for chunk in chunks if chunk.source == "sub/rivers.md"]
    assert set(titles) == {"Rivers", "Rivers: Lakes and ponds"}
    assert titles == sorted(titles)
    assert {c.start for c in chunks if c.title.endswith("ponds")} >= {
        MARKDOWN.index("## Lakes")
    }  # a heading begins a chunk
    assert [chunk.id for chunk in chunks if chunk.source == "alps.html"] == ["alps.html"]


FRENCH = "La rivière traverse l’été la forêt où naquit le château. "
RUSSIAN = "Река течёт через старый город. "


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", FRENCH.encode("utf-8-sig"), FRENCH),
        ("a.txt", RUSSIAN.encode("utf-16"), RUSSIAN),
        ("a.html", b"<meta charset=windows-1251>" + RUSSIAN.encode("cp1251"), RUSSIAN.strip()),
    ],
)
def test_encodings(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert load_documents(tmp_path)[0].text == expected


def test_html_that_nests_by_the_thousand(tmp_path: Path) -> None:
    (tmp_path / "deep.html").write_text(
        "<div>" * 5000 + "<p>At the bottom,<p> twice." + "</div>" * 4000 + "<script>never(</script>"
    )
    assert [document.text for document in load_documents(tmp_path)] == ["At the bottom,\n\ntwice."]


def test_html_with_a_long_run_of_blanks_takes_linear_time(tmp_path: Path) -> None:
    """In its text, and in the title of front matter that is not YAML."""
    blanks = " \t" * 10_000
    (tmp_path / "page.html").write_text(
        f"---\ntitle: Of: A{blanks}B\n---\n<pre>a{blanks}b</pre><p>c</p>"
    )
    start = time.process_time()
    (document,) = load_documents(tmp_path)
    assert time.process_time() - start < 2
    assert document.title == "Of: A B"
    assert document.text == f"```\na{blanks}b\n```\n\nc"


@pytest.mark.filterwarnings("ignore::refine_fast.errors.RefineFastWarning")
def test_broken_declaration_raises_nothing_of_the_parser(tmp_path: Path) -> None:
    (tmp_path / "broken.html").write_text("<![bad<p>hello</p>")
    with contextlib.suppress(
        RefineFastError
    ):  # html.parser gives up on it in some releases of Python and reads it in others
        assert "hello" in load_documents(tmp_path)[0].text


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("old.txt", ""),
        ("old.html", "<meta charset=undefined>"),
        ("old.html", "<meta charset=no-such>"),
    ],
)
def test_unknown_encoding_is_assumed_aloud(tmp_path: Path, name: str, head: str) -> None:
    (tmp_path / name).write_bytes((head + FRENCH).encode("cp1252"))
    with pytest.warns(
        RefineFastWarning,
        match=rf"{name} is not UTF-8 \(byte 0xe8 at offset {len(head) + 7}\) and is read as "
        "windows-1252; if that is wrong, name its encoding with --encoding",
    ):
        assert load_documents(tmp_path)[0].text.strip() == FRENCH.strip()


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("What was drunk there in winter.")
    documents = load_documents(tmp_path)
    assert (documents[0].id, documents[0].title) == (r"caf\xe9.txt", r"caf\xe9")
    write_records(tmp_path / "out.jsonl", documents)
    assert read_records(tmp_path / "out.jsonl", Document) == documents


def test_bad_files_are_named_and_skipped(tmp_path: Path) -> None:
    reasons = bad_folder(tmp_path)
    for name in ["a.doc", "b.doc", "LICENSE"]:
        (tmp_path / name).write_text("text")
    reasons["3 files are skipped by their suffix"] = "2 .doc, 1 no suffix"
    (tmp_path / "good.txt").write_text("The only good file.")
    with pytest.warns(RefineFastWarning) as caught:
        documents = load_documents(tmp_path)
    assert [document.id for document in documents] == ["good.txt"]
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == len(reasons)
    for name, reason in reasons.items():
        assert any(name in message and reason in message for message in messages), (name, messages)


def test_a_closed_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "open.txt").write_text("The only good file.")
    look = os.scandir

    def scandir(folder: str) -> Iterator[os.DirEntry[str]]:
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))  # the tests may run as root
        return look(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(
        RefineFastWarning,
        match=r"closed is skipped: Permission denied; check the folder's permissions.",
    ):
        assert len(load_documents(tmp_path)) == 1


@pytest.mark.filterwarnings("ignore::refine_fast.errors.RefineFastWarning")
def test_no_usable_text_is_an_error(tmp_path: Path) -> None:
    bad_folder(tmp_path)
    with pytest.raises(RefineFastError, match=r"holds no usable text; give a folder of \.txt"):
        load_documents(tmp_path)
    with pytest.raises(RefineFastError, match=r"nowhere does not exist; give a folder"):
        load_documents(tmp_path / "nowhere")


def test_files_below_a_root_are_named_from_there(tmp_path: Path) -> None:
    """Whether a file or a folder is read, and by any name of the root; others by their own."""
    (tmp_path / "docs" / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("docs")
    (tmp_path / "docs" / "sub" / "a.md").write_text("one text")
    (tmp_path / "docs" / "sub" / "deep" / "b.jsonl").write_text('{"text": "a row"}')
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.md").write_text("another")

    def names(path: str, root: str = "docs") -> list[tuple[str, str]]:
        reading = Reading(root=tmp_path / root)
        found = load_documents(tmp_path / path, reading=reading)
        return [(document.id, document.source) for document in found]

    row = "sub/deep/b.jsonl:1"
    for prefix in ("docs", "link"):
        for root in ("docs", "link"):
            assert names(f"{prefix}/sub/a.md", root) == [("sub/a.md", "sub/a.md")]
            assert names(f"{prefix}/sub/deep", root) == [(row, row)]
            assert names(prefix, root) == [("sub/a.md", "sub/a.md"), (row, row)]
    assert names("more/a.md") == names("more") == [("a.md", "a.md")]


def test_links_end(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.txt").write_text("The one file.")
    (tmp_path / "docs" / "again.txt").symlink_to(tmp_path / "docs" / "one.txt")
    (tmp_path / "docs" / "loop").symlink_to(tmp_path / "docs")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "two.txt").write_text("Linked in from elsewhere.")
    (tmp_path / "docs" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "docs" / "itself.txt").symlink_to(tmp_path / "docs" / "itself.txt")
    with pytest.warns(RefineFastWarning, match="itself.txt is skipped: Too many levels of symbol"):
        documents = load_documents(tmp_path / "docs")
    assert [document.id for document in documents] == ["again.txt", "more/two.txt"]


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz"])
def test_jsonl(tmp_path: Path, name: str) -> None:
    lines = [
        '{"_id": "a", "title": "T", "text": "First."}',
        "",
        '{"text": "Half a pair: \\ud800."}',
        '{"id": 7, "text": "Third."}',
    ]
    data = "\n".join([*lines, '{"text": ""}']).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.warns(
        RefineFastWarning,
        match=rf"1 documents are skipped because their text is empty, the first at .*{name}:5",
    ):
        documents = load_documents(tmp_path / name)
    assert [(d.id, d.title, d.text, d.source) for d in documents] == [
        ("a", "T", "First.", f"{name}:1"),
        (f"{name}:3", "", "Half a pair: \ufffd.", f"{name}:3"),
        ("7", "", "Third.", f"{name}:4"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"text": "fine"}\n{"text": ',
            r"docs.jsonl:2 is not JSON .*; write one JSON object a line",
        ),
        (b"[" * 100_000, r"docs.jsonl:1 is not JSON .*; write one JSON object a line"),
        (b'["text"]', r"docs.jsonl:1 holds a JSON list; each line must be an object"),
        (
            b'{"size": 3}',
            r"""docs.jsonl:1 has no field "text" but only \['size'\]; name the column""",
        ),
        (
            b'{"text": "fine"}\n{"body": "x"}',
            r"""docs.jsonl:2 has no field "text" but only \['body'\]; add it""",
        ),
        (b'{"text": ["x"]}', r"""docs.jsonl:1: the field "text" is \['x'\]; it must be a string"""),
        (
            b'{"id": 1, "text": "x"}\n{"id": "1", "text": "y"}',
            r'docs.jsonl:2: the id "1" was used before, at docs.jsonl:1; give every',
        ),
        (b'{"text": "\xff"}', r"docs.jsonl:1 is not UTF-8 .*; name its encoding with --encoding"),
    ],
)
def test_bad_jsonl(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "docs.jsonl").write_bytes(content)
    with pytest.raises(RefineFastError, match=message):
        load_documents(tmp_path / "docs.jsonl")


def test_each_sheet_of_a_workbook_has_columns_of_its_own(tmp_path: Path) -> None:
    """One that cannot be read is named; ids that it repeats get its name."""
    openpyxl = pytest.importorskip("openpyxl", reason="needs pip install '.[documents]'")
    sheets = {
        "Pages": [["id", "text"], ["a", "One."], ["b", "Two."]],
        "Answers": [["no.", "id", "Answer"], [1, "a", "Three."], [2, "c", "Four."]],
        "Sums": [["year", "count"], [2024, 3]],
        "Twice": [["x", "x"], [1, 2]],
        "Empty": [],
    }
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(tmp_path / "a.xlsx")
    expected = [
        Document("a", "", "One.", "a.xlsx:Pages:2"),
        Document("b", "", "Two.", "a.xlsx:Pages:3"),
        Document("a.xlsx:Answers:a", "", "Three.", "a.xlsx:Answers:2"),
        Document("c", "", "Four.", "a.xlsx:Answers:3"),
    ]
    for path in (tmp_path, tmp_path / "a.xlsx"):
        with pytest.warns(RefineFastWarning) as caught:
            assert load_documents(path) == expected
        sums, twice, renamed = (str(warning.message) for warning in caught)
        assert sums.startswith(f"the sheet 'Sums' of {tmp_path / 'a.xlsx'} is skipped: ")
        assert 'a.xlsx:Sums:2 has no field "text"' in sums
        assert "a.xlsx:Twice: two columns are named 'x'; rename one." in twice
        assert renamed.endswith('a.xlsx:Answers:2, now "a.xlsx:Answers:a".')
    for title in ("Pages", "Answers"):
        del book[title]
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(RefineFastError, match=r'a.xlsx:Sums:2 has no field "text"'):
        load_documents(tmp_path / "a.xlsx")


def test_truncated_gzip(tmp_path: Path) -> None:
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress(b'{"text": "cut off"}\n' * 1000)[:-20])
    with pytest.raises(
        RefineFastError,
        match=r"gz cannot be read after line \d+ .*; check that it exists and is complete",
    ):
        load_documents(tmp_path / "docs.jsonl.gz")


def test_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip(
        "datasets", reason="needs the pipeline: pip install '.[pipeline]'"
    )
    data = datasets.Dataset.from_dict({"_id": ["x", "y"], "text": ["One.", "Two."]})
    data.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    expected = [Document("x", "", "One.", "plain:1"), Document("y", "", "Two.", "plain:2")]
    assert load_documents(tmp_path / "plain") == expected
    with pytest.raises(
        RefineFastError, match=r"holds the splits \['test', 'train'\]; give the folder of one"
    ):
        load_documents(tmp_path / "splits")
    assert [document.text for document in load_documents(tmp_path / "splits" / "train")] == [
        "One.",
        "Two.",
    ]


def test_documents_beside_a_corpus_are_named(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "one"}\n')
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").touch()
    (tmp_path / "README.md").write_text("where it is from")
    assert len(load_documents(tmp_path)) == 1  # a warning would be an error
    (tmp_path / "other.md").write_text("another document")
    with pytest.warns(RefineFastWarning, match=r"other files there \(1, such as other.md\)"):
        assert len(load_documents(tmp_path)) == 1


@pytest.mark.parametrize(("name", "count"), [(SMALL, 150), ("covidqa", 2607)])
def test_beir_passages_stay_whole(name: str, count: int, tokenizer) -> None:
    documents = load_documents(folder_of(name))
    chunks = chunk_documents(documents, tokenizer, max_tokens=64)
    assert len(chunks) == count
    assert [(chunk.id, chunk.text, chunk.start, chunk.end) for chunk in chunks] == [
        (d.id, d.text, 0, len(d.text)) for d in documents
    ]
    kept, removed = deduplicate(chunks)
    assert len(kept) + removed.exact + removed.near == count


def test_python_docs(tokenizer) -> None:
    documents = load_documents(None)
    by_source = {document.source: document for document in documents}
    assert len(by_source) == len(documents) == len({document.id for document in documents})
    ids = {document.id for document in documents}
    assert {"topic:assert", "topic:compound"} <= ids
    assert "topic:if" not in ids  # it is a part of "compound"
    chunks, _ = deduplicate(chunk_documents(documents, tokenizer, max_tokens=128))
    # What a run of five minutes on two cores can take, whatever the Python.
    assert 500 <= len(chunks) <= 1300
    assert all(
        chunk.text == by_source[chunk.source].text[chunk.start : chunk.end] for chunk in chunks
    )


def test_one_long_line_is_split_in_linear_time_and_within_the_limit(tokenizer) -> None:
    text = "wörd " * 12_000 + "x" * 60_000
    chunks = chunk_documents([Document("d", "", text, "d")], tokenizer, max_tokens=64)
    assert all(chunk.text == text[chunk.start : chunk.end] for chunk in chunks)
    assert "".join(chunk.text for chunk in chunks).replace(" ", "") == text.replace(" ", "")
    assert max(len(tokenizer.tokenize(chunk.text)) for chunk in chunks) <= 62


def test_an_id_that_is_taken(tokenizer) -> None:
    documents = [Document("a", "", " ".join(SENTENCES), "1"), Document("a#1", "", "Short.", "2")]
    with pytest.raises(
        RefineFastError,
        match=r'^docs: the id "a#1" is a document\'s and means a part of another one',
    ):
        chunk_documents(documents, tokenizer, max_tokens=64)


def test_long_title_leaves_half_to_the_text(tokenizer) -> None:
    chunks = chunk_documents(
        [Document("d", "very long title " * 40, " ".join(SENTENCES), "d")], tokenizer, max_tokens=66
    )
    assert 16 < max(len(tokenizer.tokenize(chunk.text)) for chunk in chunks) <= 32
    assert {chunk.title for chunk in chunks} == {("very long title " * 11)[:-7]}
    assert all(len(tokenizer(f"{chunk.title} {chunk.text}").input_ids) <= 66 for chunk in chunks)
    with pytest.raises(ValueError, match="max_tokens is 10; it must be at least 18"):
        chunk_documents([], tokenizer, max_tokens=10)


def test_deduplicate() -> None:
    base = " ".join(SENTENCES[:12])
    texts = {
        "first": base,
        "same but blanks and case": base.upper().replace(" ", "\n "),
        "one word in a hundred": base.replace("number 5", "numeral 5"),
        "half of it": " ".join(SENTENCES[:6]),
        "another": " ".join(SENTENCES[30:42]),
        "中": "水は低いところへ流れて、やがて海に着く。" * 3,
        "中 with another end": "水は低いところへ流れて、やがて海に着く。" * 3 + "終",
        "short": "a b",
    }
    chunks = [Chunk(name, text, "", name, 0, len(text)) for name, text in texts.items()]
    kept, removed = deduplicate(chunks)
    assert [chunk.id for chunk in kept] == ["first", "half of it", "another", "中", "short"]
    assert removed == Duplicates(exact=1, near=2)
    assert deduplicate([]) == ([], Duplicates(0, 0))


def test_the_same_answer_under_two_titles_is_two_passages() -> None:
    answer = "Do you have high chairs? Yes, high chairs are available here."
    chunks = [Chunk(name, answer, name, name, 0, len(answer)) for name in ("Hakka", "Sesame")]
    assert deduplicate(chunks) == (chunks, Duplicates(0, 0))
    page = " ".join(SENTENCES[:40])  # but a page that is mirrored under another title is one
    mirrored = [Chunk(name, page, name, name, 0, len(page)) for name in ("Hakka", "Sesame")]
    assert deduplicate(mirrored) == (mirrored[:1], Duplicates(0, 1))


def test_records_survive_a_round_trip(tmp_path: Path) -> None:
    chunks = [Chunk("a#0", "Zeile\u2028eins\n", "T", "a", 0, 11)]
    write_records(tmp_path / "chunks.jsonl", chunks)
    assert read_records(tmp_path / "chunks.jsonl", Chunk) == chunks
    assert [path.name for path in tmp_path.iterdir()] == ["chunks.jsonl"]
    (tmp_path / "old.jsonl").write_text(json.dumps({"id": "a"}))
    with pytest.raises(
        RefineFastError,
        match=r"old.jsonl:1 has the fields \['id'\], not .*; delete it and run again",
    ):
        read_records(tmp_path / "old.jsonl", Chunk)
