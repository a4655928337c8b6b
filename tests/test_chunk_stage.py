"""The chunk stage: which duplicates stay, and what the user is told about the documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from refine_fast.errors import RefineFastError, RefineFastWarning

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")

from refine_fast.pipeline.config import RunConfig
from refine_fast.pipeline.console import Console
from refine_fast.pipeline.context import RunContext
from refine_fast.pipeline.corpus.language import other_language
from refine_fast.pipeline.encoder.load import encoder_folder
from refine_fast.pipeline.queries.query import Query
from refine_fast.pipeline.queries.synthetic import synthesize_queries
from refine_fast.pipeline.stages.chunk import cut_corpus
from refine_fast.pipeline.stages.query import (
    added_queries,
    dev_queries,
    offline_queries,
    split_queries,
)

TEMPLATE = " ".join(
    f"Clause {i}: the buyer keeps the {part} dry, checks it every month and reports each crack."
    for i, part in enumerate(["pump", "valve", "seal", "cover", "belt", "gauge", "lamp", "hose"])
)
PAGES = {f"P{i}": f"The rated pressure of the P{i} is {i} bar. {TEMPLATE}" for i in range(12)}
OTHERS = {
    "rain": "Rain fell on the old town all day and the river rose by two metres.",
    "bakery": "The bakery opens at six and sells rye bread until noon.",
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def documents(folder: Path, texts: dict[str, str]) -> Path:
    return write(folder / "docs.jsonl", [{"_id": id, "text": t} for id, t in texts.items()])


def context(encoder: Path, folder: Path, docs: Path, **options: Any) -> RunContext:
    config = RunConfig(out=folder / "run", docs=docs, model=str(encoder), **options)
    return RunContext(config, encoder, Console(quiet=True))


def test_template_pages_are_removed_aloud_and_kept_on_request(minilm: Path, tmp_path: Path) -> None:
    docs = documents(tmp_path, PAGES | OTHERS)
    message = r"11 of 14 chunks are removed as near duplicates .* --dedup exact keeps them"
    with pytest.warns(RefineFastWarning, match=message):
        _, chunks, removed = cut_corpus(context(minilm, tmp_path, docs))
    assert [chunk.id for chunk in chunks] == ["P0", "rain", "bakery"]
    assert (removed.exact, removed.near) == (0, 11)
    for dedup in ("exact", "keep"):
        _, chunks, removed = cut_corpus(context(minilm, tmp_path, docs, dedup=dedup))
        assert (removed.exact, removed.near) == (0, 0)
        assert {chunk.id.partition("#")[0] for chunk in chunks} >= set(PAGES)


@pytest.mark.filterwarnings("ignore::refine_fast.errors.RefineFastWarning")
def test_too_few_chunks_blames_the_duplicates(tiny: Path, tmp_path: Path) -> None:
    docs = documents(tmp_path, dict.fromkeys("abc", "The same text."))
    message = r"gives 1 chunks of text after 2 duplicates are removed, .* --dedup keep\.$"
    with pytest.raises(RefineFastError, match=message):
        cut_corpus(context(tiny, tmp_path, docs))


def test_labelled_documents_are_never_near_duplicates(minilm: Path, tmp_path: Path) -> None:
    docs = documents(tmp_path, PAGES | OTHERS)
    asked = [{"text": f"pressure of the {id}", "doc_id": id} for id in ("P3", "P7", "rain")]
    queries = write(tmp_path / "queries.jsonl", asked)
    here = context(minilm, tmp_path, docs, queries=queries)
    with pytest.warns(RefineFastWarning, match=r"9 of 14 chunks are removed as near duplicates"):
        _, chunks, removed = cut_corpus(here)
    assert [chunk.id for chunk in chunks] == ["P0", "P3", "P7", "rain", "bakery"]
    found = offline_queries(here, chunks, removed.twins)
    assert [query.chunk_id for query in found] == ["P3", "P7", "rain"]
    # The same, where the queries give the texts.
    texts = [{"query": item["text"], "pos": [(PAGES | OTHERS)[item["doc_id"]]]} for item in asked]
    write(queries, texts)
    with pytest.warns(RefineFastWarning, match=r"9 of 14 chunks"):
        assert cut_corpus(here)[1] == chunks
    assert offline_queries(here, chunks, {}) == found


def test_queries_move_to_the_kept_twin(tiny: Path, tmp_path: Path) -> None:
    long = " ".join(f"Sentence {i} tells of gate {i * i} and of its key." for i in range(60))
    texts = {"a": OTHERS["rain"], "b": OTHERS["rain"].upper(), "c": long, "d": long, **OTHERS}
    del texts["rain"]
    docs = documents(tmp_path, texts)
    asked = [("when did the river rise", "b"), ("key of gate 3481", "d"), ("rye bread", "bakery")]
    queries = write(tmp_path / "q.jsonl", [{"text": t, "doc_id": id} for t, id in asked])
    here = context(tiny, tmp_path, docs, queries=queries)
    _, chunks, removed = cut_corpus(here)
    kept = {chunk.id: chunk for chunk in chunks}
    assert removed.twins["b"] == "a"
    assert not {"b", "d"} & {id.partition("#")[0] for id in kept}
    first, second, third = (
        query.chunk_id for query in offline_queries(here, chunks, removed.twins)
    )
    assert (first, third) == ("a", "bakery")
    assert second.startswith("c#")
    assert "gate 3481 " in kept[second].text


def test_the_queries_are_no_documents(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    documents(folder, OTHERS)
    queries = write(folder / "queries.jsonl", [{"text": "rye bread", "doc_id": "bakery"}])
    count, chunks, _ = cut_corpus(context(tiny, tmp_path, folder, queries=queries))
    assert count == 2
    assert [chunk.id for chunk in chunks] == list(OTHERS)


def test_long_passages_are_said_to_be_cut(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"_id": id, "title": "T", "text": text} for id, text in OTHERS.items()]
    write(
        folder / "corpus.jsonl",
        [*rows, {"_id": "long", "text": " ".join(map(str, range(100, 300)))}],
    )
    message = (
        r"^1 of 3 passages are longer than the 96 tokens that the encoder reads \(the longest has "
        r"202\), and the rest of them is ignored; give .*/set/corpus\.jsonl as DOCS to split them"
    )
    with pytest.warns(RefineFastWarning, match=message):
        _, chunks, _ = cut_corpus(context(tiny, tmp_path, folder))
    assert len(chunks) == 3
    _, chunks, _ = cut_corpus(context(tiny, tmp_path, folder / "corpus.jsonl"))  # no warning
    assert len(chunks) > 3


SENTENCES = {
    "the Han script": "签名密钥每九十天轮换一次，旧密钥在更换后仍有效一周。",
    "the Thai script": "กุญแจลงนามจะถูกเปลี่ยนทุกเก้าสิบวันโดยทีมปฏิบัติการ",
    "the Khmer script": "សោហត្ថលេខាត្រូវបានផ្លាស់ប្តូររៀងរាល់កៅសិបថ្ងៃ។",
    "the Cyrillic script": "Ключи подписи меняются каждые девяносто дней.",
    "the Devanagari script": "हस्ताक्षर कुंजियाँ हर नब्बे दिन में बदली जाती हैं।",
    "the Arabic script": "تُبدَّل مفاتيح التوقيع كل تسعين يومًا.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_script_of_the_documents(language: str) -> None:
    texts = [SENTENCES[language]] * 6 + list(OTHERS.values())
    assert other_language(texts) == language
    assert other_language([SENTENCES[language], *[*OTHERS.values()] * 10]) is None


def test_language_of_the_documents() -> None:
    pytest.importorskip("py3langid", reason="needs pip install '.[llm]'")
    german = "Die Signaturschlüssel werden alle neunzig Tage vom Betriebsteam gewechselt."
    vietnamese = "Khóa ký được thay đổi chín mươi ngày một lần bởi đội vận hành."
    assert other_language([german] * 3 + list(OTHERS.values())) == "the language 'de'"
    assert other_language([vietnamese] * 3) == "the language 'vi'"
    assert other_language([german] * 2 + list(OTHERS.values())) is None
    assert other_language(["12 | 34", "---"]) is None


def test_the_bundled_encoder_warns_of_other_languages(minilm: Path, tmp_path: Path) -> None:
    docs = documents(
        tmp_path, dict(enumerate(SENTENCES.values())) | {"a": SENTENCES["the Thai script"]}
    )
    config = RunConfig(out=tmp_path / "run", docs=docs)
    here = RunContext(config, encoder_folder(config.model), Console(quiet=True))
    with pytest.warns(RefineFastWarning, match=r"^most documents are in the Thai script, and min"):
        cut_corpus(here)
    cut_corpus(context(minilm, tmp_path, docs))  # an encoder of the user's own: no word


def beir(folder: Path, dev: int) -> Path:
    """A BEIR folder: 60 passages, the first 45 with a training query, the last ``dev`` with one of
    split dev, which P50 answers too, and P50 with a query that dev and test ask."""
    (folder / "qrels").mkdir(parents=True)
    ids = [f"P{i}" for i in range(60)]
    write(folder / "corpus.jsonl", [{"_id": id, "text": f"{id} is {id * 3}."} for id in ids])
    write(folder / "queries.jsonl", [{"_id": id, "text": f"What is {id}?"} for id in ids])
    for split, judged in {
        "train": ids[:45],
        "dev": [ids[50], *ids[-dev:]],
        "test": ids[50:51],
    }.items():
        answers = [(id, id) for id in judged] + [(id, "P50") for id in judged if split == "dev"]
        rows = "".join(f"{id}\t{answer}\t1\n" for id, answer in dict.fromkeys(answers))
        (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    return folder


@pytest.mark.parametrize(
    ("dev", "most", "used"), [(8, 1000, False), (9, 1000, True), (8, 8, True), (7, 8, False)]
)
def test_the_split_dev_chooses_where_it_is_as_large_as_what_would_be_held_out(
    tiny: Path, tmp_path: Path, monkeypatch, dev: int, most: int, used: bool
) -> None:
    """Or as what would be scored of that. One that is too small is named."""
    monkeypatch.setattr("refine_fast.pipeline.stages.query.MOST_DEV", most)
    said: list[str] = []
    monkeypatch.setattr(Console, "say", lambda _, line: said.append(line))
    folder = beir(tmp_path / "set", dev)
    for docs in (folder, folder / "corpus.jsonl"):  # with judged test queries, and without
        here = context(tiny, tmp_path, docs, queries=folder, dedup="keep", held_out=0.1)
        _, chunks, _ = cut_corpus(here)
        parts = split_queries(
            here, chunks, offline_queries(here, chunks, {}), dev_queries(here, chunks, {})
        )
        held_out = 0 if docs == folder else 5
        assert len(parts.get("held_out", [])) == held_out
        asked = {query.chunk_id for query in parts["dev"]}
        if used:
            assert asked == {"P50", *(f"P{i}" for i in range(60 - dev, 60))}
        else:
            assert len(asked) == 9
            assert asked <= {f"P{i}" for i in range(45)}
        assert len(parts["train"]) == 45 - held_out - (0 if used else 9)
        assert not asked & {query.chunk_id for query in parts["train"]}
    told = [line for line in said if f"the split dev has {dev} queries, too few to choose" in line]
    assert len(told) == (0 if used else 2)


def test_made_queries_beside_the_users_are_trained_on_alone(
    tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    """None that the user's splits dev and test ask."""
    asked = [Query(f"what is P{i}?", "P0", "span") for i in (59, 50)]
    monkeypatch.setattr(
        "refine_fast.pipeline.stages.query.synthesize_queries",
        lambda *given, **how: [*synthesize_queries(*given, **how), *asked],
    )
    folder = beir(tmp_path / "set", 9)
    ids = [f"P{i}" for i in range(60)]
    texts = [f"{id} is {id * 3}. {OTHERS['rain']} {OTHERS['bakery']}" for id in ids]
    write(
        folder / "corpus.jsonl",
        [{"_id": id, "text": text} for id, text in zip(ids, texts, strict=True)],
    )
    for docs in (folder, folder / "corpus.jsonl"):
        here = context(tiny, tmp_path, docs, queries=folder, dedup="keep", query_kinds="span")
        _, chunks, _ = cut_corpus(here)
        given = offline_queries(here, chunks, {}), dev_queries(here, chunks, {})
        parts = split_queries(here, chunks, *given, added_queries(here, chunks))
        made = [query for query in parts.pop("train") if query.kind == "span"]
        assert made
        assert not set(asked) & set(made)
        assert {query.kind for part in parts.values() for query in part} == {"user"}
        held_out = {query.chunk_id for query in parts.get("held_out", [])}
        assert not held_out & {query.chunk_id for query in made}


def test_queries_that_the_documents_test_asks_are_counted(
    tiny: Path, tmp_path: Path, monkeypatch
) -> None:
    """As those of a file, which knows nothing of that test."""
    said: list[str] = []
    monkeypatch.setattr(Console, "say", lambda _, line: said.append(line))
    folder = beir(tmp_path / "set", 1)
    asked = [{"text": f"What is P{i}?", "doc_id": f"P{i}"} for i in range(40, 52)]
    write(tmp_path / "asked.jsonl", [*asked, {"text": "What is P50?", "doc_id": "P1"}])
    here = context(tiny, tmp_path, folder, queries=tmp_path / "asked.jsonl", dedup="keep")
    _, chunks, _ = cut_corpus(here)
    split_queries(here, chunks, offline_queries(here, chunks, {}))
    assert ("  1 of 12 queries are left out, since the documents' split test asks them too") in said


def test_passages_of_the_split_dev_are_never_near_duplicates(minilm: Path, tmp_path: Path) -> None:
    docs = documents(tmp_path, PAGES | OTHERS)
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", [{"_id": id, "text": text} for id, text in PAGES.items()])
    write(folder / "queries.jsonl", [{"_id": id, "text": f"pressure of {id}"} for id in PAGES])
    for split, id in (("train", "P3"), ("dev", "P7")):
        (folder / "qrels" / f"{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{id}\t{id}\t1")
    here = context(minilm, tmp_path, docs, queries=folder)
    with pytest.warns(RefineFastWarning, match=r"9 of 14 chunks are removed as near duplicates"):
        _, chunks, removed = cut_corpus(here)
    assert [chunk.id for chunk in chunks] == ["P0", "P3", "P7", "rain", "bakery"]
    assert [query.chunk_id for query in dev_queries(here, chunks, removed.twins)] == ["P7"]
