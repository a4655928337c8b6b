"""Queries from the files of other tools."""

from __future__ import annotations

import csv
import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refine_fast.errors import RefineFastError, RefineFastWarning
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.documents import Reading, load_documents
from refine_fast.pipeline.queries.user import load_queries
from refine_fast.pipeline.queries.user_formats import query_files, query_texts, read_judgements

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")

DOCUMENTS = {
    "lathe": "The lathe of the northern shed turns shafts of up to four metres. It is oiled daily.",
    "kiln": "The kiln burns bricks at a thousand degrees. A batch takes three days to cool down.",
    "sieve": "Sand passes through the drum sieve twice. Stones are carted to the old quarry pond.",
}
QUERIES = {
    "how long are the shafts": "lathe",
    "when may the bricks be taken out": "kiln",
    "where do stones end": "sieve",
}
CHUNKS = [Chunk(id, text, "", id, 0, len(text)) for id, text in DOCUMENTS.items()]
ROWS = list(QUERIES.items())

Write = Callable[[Path], Path]


def lines(name: str, row: Callable[[str, str], dict[str, Any]]) -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        text = "".join(json.dumps(row(*item), ensure_ascii=False) + "\n" for item in ROWS)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text)
        return path

    return write


def table(name: str, header: list[str], row: Callable[[str, str], list[str]]) -> Write:
    def write(folder: Path) -> Path:
        path = folder / name
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",")
            writer.writerows([header, *(row(*item) for item in ROWS)])
        return path

    return write


def parquet(row: Callable[[str, str], dict[str, Any]]) -> Write:
    def write(folder: Path) -> Path:
        import pyarrow
        import pyarrow.parquet

        path = folder / "pairs.parquet"
        rows = [row(*item) for item in ROWS]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path

    return write


def llama_index(folder: Path, *, own_ids: bool = False) -> Path:
    """own_ids: nodes are named by UUIDs that the documents do not have."""
    name = (lambda id: f"node-{id}") if own_ids else str
    value = {
        "queries": {f"q{i}": query for i, (query, _) in enumerate(ROWS)},
        "corpus": {name(id): text for id, text in DOCUMENTS.items()},
        "relevant_docs": {f"q{i}": [name(id)] for i, (_, id) in enumerate(ROWS)},
        "mode": "text",
    }
    path = folder / "dataset.json"
    path.write_text(json.dumps(value, indent=2))
    return path


def gpl(folder: Path, part: str) -> Path:
    """GPL's output folder, or one of its files."""
    queries = [{"_id": f"g{i}", "text": query} for i, (query, _) in enumerate(ROWS)]
    (folder / "qgen-queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (folder / "qgen-qrels").mkdir()
    qrels = "".join(f"g{i}\t{id}\t1\n" for i, (_, id) in enumerate(ROWS))
    (folder / "qgen-qrels" / "train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{qrels}")
    hard = [
        {"qid": f"g{i}", "pos": [id], "neg": {"bm25": ["kiln"]}} for i, (_, id) in enumerate(ROWS)
    ]
    (folder / "hard-negatives.jsonl").write_text("\n".join(map(json.dumps, hard)))
    margins = [f"g{i}\t{id}\tkiln\t{m}\n" for i, (_, id) in enumerate(ROWS) for m in (3.2, 5.0)]
    (folder / "gpl-training-data.tsv").write_text("".join(margins))
    return folder / part


def inside(folder: Path) -> Path:
    """{"data": [...]}, which documents may be in too."""
    path = folder / "q.json"
    rows = [{"question": q, "context": DOCUMENTS[id]} for q, id in ROWS]
    path.write_text(json.dumps({"version": 1, "data": rows}))
    return path


def excel(folder: Path) -> Path:
    openpyxl = pytest.importorskip("openpyxl", reason="needs pip install '.[documents]'")
    book = openpyxl.Workbook()
    for row in [["query", "doc_id"], *ROWS]:
        book.active.append(row)
    book.save(folder / "q.xlsx")
    return folder / "q.xlsx"


def zipped(folder: Path) -> Path:
    path = folder / "q.csv.gz"
    text = "query;doc_id\n" + "".join(f"{query};{id}\n" for query, id in ROWS)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def passage(id: str) -> dict[str, str]:
    return {"docid": id, "title": "", "text": DOCUMENTS[id]}


FORMATS: dict[str, Write] = {
    "query and doc_id": lines("q.jsonl", lambda q, id: {"query": q, "doc_id": id}),
    "list of doc_ids": lines("q.jsonl", lambda q, id: {"text": q, "doc_ids": [id]}),
    "ndjson": lines("q.ndjson", lambda q, id: {"text": q, "doc_id": id}),
    "gzip": lines("q.jsonl.gz", lambda q, id: {"text": q, "doc_id": id}),
    "JSON lines named json": lines("q.json", lambda q, id: {"text": q, "doc_id": id}),
    "FlagEmbedding": lines(
        "q.jsonl", lambda q, id: {"query": q, "pos": [DOCUMENTS[id]], "neg": []}
    ),
    "tevatron": lines(
        "q.jsonl",
        lambda q, id: {
            "query_id": "1",
            "query": q,
            "positive_passages": [passage(id)],
            "negative_passages": [passage("kiln")],
        },
    ),
    "tevatron, ids of another index": lines(
        "q.jsonl", lambda q, id: {"query": q, "positive_passages": [{**passage(id), "docid": "17"}]}
    ),
    "tevatron 2": lines("q.jsonl", lambda q, id: {"query_text": q, "positive_document_ids": [id]}),
    "anchor and positive": lines(
        "q.jsonl", lambda q, id: {"anchor": q, "positive": DOCUMENTS[id], "negative": "x"}
    ),
    "anchor and positive ids": lines("q.jsonl", lambda q, id: {"anchor": q, "positive": id}),
    "query and text": lines("q.jsonl", lambda q, id: {"query": q, "text": DOCUMENTS[id]}),
    "another case and spacing": lines(
        "q.jsonl", lambda q, id: {"query": q, "pos": [f"  {DOCUMENTS[id].upper()} "]}
    ),
    "with the heading before": lines(
        "q.jsonl", lambda q, id: {"query": q, "pos": [f"Works manual, part 2. {DOCUMENTS[id]}"]}
    ),
    "csv of ids": table("q.csv", ["query", "doc_id"], lambda q, id: [q, id]),
    "csv of texts": table(
        "q.csv", ["anchor", "positive", "negative"], lambda q, id: [q, DOCUMENTS[id], "x"]
    ),
    "csv of a list": table("q.csv", ["query", "doc_ids"], lambda q, id: [q, json.dumps([id])]),
    "tsv": table("q.tsv", ["query", "corpus-id"], lambda q, id: [q, id]),
    "parquet of texts": parquet(lambda q, id: {"anchor": q, "positive": DOCUMENTS[id]}),
    "parquet of lists": parquet(lambda q, id: {"query": q, "pos": [DOCUMENTS[id]], "neg": ["x"]}),
    "parquet of ids of another index and texts": parquet(
        lambda q, id: {"query": q, "positive_ids": ["17"], "positives": [DOCUMENTS[id]]}
    ),
    "a run's own queries": lines("q.jsonl", lambda q, id: {"text": q, "chunk_id": id, "kind": "x"}),
    "JSON with the rows inside": lambda folder: inside(folder),
    "Excel": lambda folder: excel(folder),
    "csv with semicolons, zipped": lambda folder: zipped(folder),
    "llama_index": llama_index,
    "llama_index, own ids": lambda folder: llama_index(folder, own_ids=True),
    "GPL folder": lambda folder: gpl(folder, "."),
    "GPL hard negatives": lambda folder: gpl(folder, "hard-negatives.jsonl"),
    "GPL margins": lambda folder: gpl(folder, "gpl-training-data.tsv"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, name: str) -> None:
    queries = load_queries(FORMATS[name](tmp_path), CHUNKS)
    assert {query.text: query.chunk_id for query in queries} == QUERIES
    assert len(queries) == len(QUERIES)


def test_a_positive_that_was_cut_takes_the_chunk_nearest_to_the_query(tmp_path: Path) -> None:
    whole = " ".join(DOCUMENTS.values())
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"query": q, "pos": [whole]}) + "\n" for q in QUERIES))
    asked = {"when may the bricks be taken out": "kiln", "where do stones end": "sieve"}
    found = {query.text: query.chunk_id for query in load_queries(path, CHUNKS)}
    assert asked.items() <= found.items()


def test_a_text_that_is_no_document_is_named(tmp_path: Path) -> None:
    path = tmp_path / "q.csv"
    rows = [
        ["query", "positive"],
        ["a b", "Nobody has ever written this text."],
        [ROWS[0][0], "lathe"],
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    with pytest.warns(RefineFastWarning, match=r'1 of 2 .* the first "Nobody has .*q.csv:2'):
        assert [query.chunk_id for query in load_queries(path, CHUNKS)] == ["lathe"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.txt", "a", r"must be a BEIR folder or a file that ends in \.jsonl, .*\.parquet"),
        ("q.csv", "name,doc_id\nx,lathe\n", r'q.csv:2 has no field "text" with the query'),
        ("q.csv", "query,doc\nx,lathe\n", r'q.csv:2 has no field "doc_id" .*, or "positive"'),
        ("q.json", '"text"', "holds a JSON str, not a list of objects"),
        ("q.json", "[1]", r"q.json:1 holds a JSON int; each item .* must be an object"),
        ("q.json", '{"queries": {}, "relevant_docs": {"a": ["lathe"]}}', "query a has no text in"),
        ("q.json", '{"queries": {"a": " "}, "relevant_docs": {"a": ["kiln"]}}', "query a is empty"),
        ("q.parquet", "no parquet", "q.parquet cannot be read: it is not a Parq"),
        ("hard-negatives.jsonl", '{"qid": "1", "pos": ["a"], "neg": {}}', "put qgen-queries.jsonl"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RefineFastError, match=message):
        list(read_judgements(tmp_path / name))


RUSSIAN = "где стоит токарный станок"


def encoded(folder: Path, name: str, encoding: str) -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        rows = [{"text": "first", "doc_id": "kiln"}, {"text": RUSSIAN, "doc_id": "lathe"}]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = f"query,doc_id\nfirst,kiln\n{RUSSIAN},lathe\n"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("name", ["q.jsonl", "q.csv"])
def test_encodings(tmp_path: Path, name: str) -> None:
    """--encoding is of the documents; queries in UTF-8 stay so."""
    for encoding, given in (
        ("utf-8", None),
        ("utf-8", "windows-1251"),
        ("utf-8-sig", None),
        ("utf-8-sig", "windows-1251"),
        ("windows-1251", "windows-1251"),
        ("utf-16", "utf-16"),
    ):
        path = encoded(tmp_path, name, encoding)
        found = [(item.query, item.doc_id) for item in read_judgements(path, encoding=given)]
        assert found == [("first", "kiln"), (RUSSIAN, "lathe")]


def test_the_files_that_hold_queries(tmp_path: Path) -> None:
    """GPL's, and an exported BEIR folder's negatives, have the texts of their queries beside
    them."""
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "What holds water?"}\n')
    by_id, own = tmp_path / "hard-negatives.jsonl", tmp_path / "own.jsonl"
    by_id.write_text('{"qid": "1", "pos": ["lathe"], "neg": {}}\n')
    own.write_text('{"text": "What holds water?", "doc_id": "lathe"}\n')
    assert query_texts(by_id) == tmp_path / "queries.jsonl"
    assert query_files(by_id) == [by_id, tmp_path / "queries.jsonl"]
    for path in (own, tmp_path / "missing.jsonl", tmp_path):
        assert query_texts(path) is None
    assert query_files(own) == [own]
    assert [item.query for item in read_judgements(by_id)] == ["What holds water?"]

    (tmp_path / "lathe.txt").write_text("A lathe holds no water.")
    (tmp_path / "corpus.txt").write_text("A kiln is dry.")
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\n1\tlathe.txt\t1\n")
    own.unlink()
    by_id.unlink()
    reading = Reading(exclude=query_files(tmp_path))
    documents = load_documents(tmp_path, reading=reading)
    assert [document.id for document in documents] == ["corpus.txt", "lathe.txt"]


def test_a_sheet_that_holds_no_queries_is_named(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl", reason="needs pip install '.[documents]'")
    book = openpyxl.load_workbook(excel(tmp_path))
    sheets = {
        "Sums": [["year", "count"], [2024, 3]],
        "More": [["question", "positive"], ["what is oiled", DOCUMENTS["lathe"]]],
    }
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(tmp_path / "q.xlsx")
    with pytest.warns(RefineFastWarning, match="the sheet 'Sums' of .* is skipped: .*Sums:2"):
        found = list(read_judgements(tmp_path / "q.xlsx"))
    assert [item.query for item in found] == [*QUERIES, "what is oiled"]
    assert found[-1].where == f"{tmp_path / 'q.xlsx'}:More:2"


def test_json_lines_in_another_encoding_name_line_and_remedy(tmp_path: Path) -> None:
    path = encoded(tmp_path, "q.jsonl", "windows-1251")
    with pytest.raises(
        RefineFastError,
        match=r"q.jsonl:2 is not UTF-8 \(.*\); name its encoding with --encoding\.$",
    ):
        list(read_judgements(path))


def test_a_csv_in_another_encoding_is_read_with_a_warning(tmp_path: Path) -> None:
    text = "query,doc_id\n" + "".join(f"{RUSSIAN} номер {i},lathe\n" for i in range(9))
    (tmp_path / "q.csv").write_bytes(text.encode("windows-1251"))
    with pytest.warns(RefineFastWarning, match="q.csv is not UTF-8 .*; .* with --encoding"):
        found = list(read_judgements(tmp_path / "q.csv"))
    assert found[0].query == f"{RUSSIAN} номер 0"
    with warnings.catch_warnings():  # once is enough
        warnings.simplefilter("error")
        assert query_texts(tmp_path / "q.csv") is None


def test_a_field_of_llama_index_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text('{"queries": ["a"], "relevant_docs": {}, "corpus": {}}')
    with pytest.raises(RefineFastError, match='the field "queries" must be an object'):
        list(read_judgements(path))


def test_margins_with_one_column(tmp_path: Path) -> None:
    path = gpl(tmp_path, "gpl-training-data.tsv")
    path.write_text("g0\n")
    with pytest.raises(
        RefineFastError, match="tsv:1 has one column; it must name a query and a doc"
    ):
        list(read_judgements(path))
