"""Queries: made without an LLM, and the user's own."""
# ruff: noqa: E501 - tables of texts

from __future__ import annotations

import json
import re
import shutil
import unicodedata
from functools import partial
from pathlib import Path

import pytest
from retrieval_sets import SMALL, folder_of

from refine_fast.errors import RefineFastError, RefineFastWarning
from refine_fast.pipeline.corpus.beir import DEV_SPLITS, judged_queries
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import read_jsonl
from refine_fast.pipeline.queries.query import Query
from refine_fast.pipeline.queries.salient import content_words, salient_terms
from refine_fast.pipeline.queries.synthetic import synthesize_queries
from refine_fast.pipeline.queries.user import load_dev_queries, load_queries

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")

SEARCHED = ("cloze", "span", "cloze", "title")
"""Kinds that any chunk offers."""
TEXTS = {
    "rivers#0": (
        "Rivers",
        "The Oder rises in the Czech mountains and runs to the Baltic Sea. Barges carry coal on it all year.",
    ),
    "rivers#1": (
        "Rivers",
        "The Elbe passes Dresden and Hamburg on its way to the North Sea. Paddle steamers still run near Dresden.",
    ),
    "glaciers": (
        "Glaciers",
        "A glacier forms where more snow falls than melts over many years. The Aletsch is the longest glacier.",
    ),
    "numbers": ("", "1 2 3 4."),
}
CHUNKS = [
    Chunk(id, text, title, id.partition("#")[0], 0, len(text))
    for id, (title, text) in TEXTS.items()
]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def test_synthetic_queries_come_from_their_chunk() -> None:
    queries = synthesize_queries(CHUNKS, seed=0, per_chunk=4, kinds=SEARCHED)
    chunks = {chunk.id: chunk for chunk in CHUNKS}
    assert {query.kind for query in queries} == set(SEARCHED)
    for query in queries:
        assert words(query.text) <= words(chunks[query.chunk_id].passage), query
        if query.kind == "cloze":
            chunk = chunks[query.chunk_id]
            assert query.text.removeprefix(f"{chunk.title}: ") in chunk.text
    assert Query("Glaciers", "glaciers", "title") in queries
    shared = [
        query.text
        for query in queries
        if query.kind == "title" and query.chunk_id.startswith("rivers")
    ]
    assert len(shared) == 2
    assert all(text.startswith("Rivers ") and len(text) > len("Rivers ") for text in shared)
    assert not [query for query in queries if query.chunk_id == "numbers"]  # nothing to ask about


def test_sentences_of_scripts_without_blanks() -> None:
    sentences = ["春天来了，河水上涨，渔民们在黎明时分出发。", "城市的旧港口建于一八七一年。"]
    queries = synthesize_queries(
        [Chunk("a", "".join(sentences), "", "a", 0, 35)], seed=0, per_chunk=4, kinds=SEARCHED
    )
    assert sorted(query.text for query in queries if query.kind == "cloze") == sorted(sentences)


# language -> two sentences, none of which may come apart
TWO_SENTENCES = {
    "Chinese": ("水库的闸门每年春天检修一次，由两名工人完成。", "洪水来临时，值班员要打开全部闸门。"),
    "Japanese": ("貯水池の水門は毎年春に二人の作業員が点検します。", "洪水のときは当番がすべての水門を開けます。"),
    "Korean": ("저수지의 수문은 매년 봄에 두 명이 함께 점검합니다. ", "홍수가 나면 당직자가 모든 수문을 바로 엽니다."),
    "Thai": ("ประตูน้ำของอ่างเก็บน้ำได้รับการตรวจทุกฤดูใบไม้ผลิ ", "เมื่อน้ำท่วมเจ้าหน้าที่เวรต้องเปิดประตูน้ำทุกบาน"),
    "Lao": ("ປະຕູນ້ຳຂອງອ່າງເກັບນ້ຳໄດ້ຮັບການກວດທຸກລະດູໃບໄມ້ປົ່ງ ", "ເມື່ອນ້ຳຖ້ວມຜູ້ຢູ່ເວນຕ້ອງເປີດປະຕູນ້ຳທຸກບານ"),
    "Khmer": ("ទ្វារទឹកនៃអាងស្តុកទឹកត្រូវបានត្រួតពិនិត្យរៀងរាល់និទាឃរដូវ។", "ពេលទឹកជំនន់ អ្នកយាមត្រូវបើកទ្វារទឹកទាំងអស់។"),
    "Burmese": ("ရေလှောင်ကန်၏ ရေတံခါးများကို နွေဦးတိုင်း စစ်ဆေးသည်။ ", "ရေကြီးလျှင် တာဝန်ကျသူက ရေတံခါးအားလုံးကို ဖွင့်ရမည်။"),
    "Hindi": ("जलाशय के फाटकों की जाँच हर वसंत में होती है। ", "बाढ़ आने पर पहरेदार सभी फाटक खोल देता है।"),
    "Tamil": ("நீர்த்தேக்கத்தின் மதகுகள் ஒவ்வொரு வசந்த காலத்திலும் இருவரால் சோதிக்கப்படுகின்றன. ", "வெள்ளம் வந்தால் காவலர் எல்லா மதகுகளையும் உடனே திறப்பார்."),
    "Arabic, pointed": ("تُفحَص بوّابات الخزّان في كلّ ربيع من قِبل عاملَين. ", "عند الفيضان يفتح الحارس كلّ البوّابات فورًا."),
    "Hebrew": ("שערי המאגר נבדקים בכל אביב על ידי שני עובדים. ", "בעת שיטפון השומר פותח מיד את כל השערים."),
    "Russian": ("Затворы водохранилища проверяют каждую весну двое рабочих. ", "При паводке дежурный сразу открывает все затворы."),
    "Turkish": ("Barajın kapakları her ilkbaharda iki işçi tarafından denetlenir. ", "Sel gelirse nöbetçi bütün kapakları hemen açar."),
    "Vietnamese": ("Cửa xả của hồ chứa được hai công nhân kiểm tra mỗi mùa xuân. ", "Khi có lũ, người trực mở ngay tất cả các cửa."),
}  # fmt: skip


@pytest.mark.parametrize("language", TWO_SENTENCES)
def test_every_language_gets_sentences_and_whole_terms(language: str) -> None:
    sentences = [sentence.strip() for sentence in TWO_SENTENCES[language]]
    text = "".join(TWO_SENTENCES[language])
    others = ["".join(pair) for name, pair in TWO_SENTENCES.items() if name != language]
    chunks = [
        Chunk(f"c{i}", text, "", f"c{i}", 0, len(text)) for i, text in enumerate([text, *others])
    ]
    made = synthesize_queries(chunks, seed=0, per_chunk=4, kinds=SEARCHED)
    queries = [query for query in made if query.chunk_id == "c0"]
    assert {query.text for query in queries if query.kind == "cloze"} == set(sentences)
    spans = {query.text for query in queries if query.kind == "span"}
    assert spans
    for span in spans:
        assert len(span) < 0.8 * len(text), "strings whole clauses together"
        for term in span.split():
            if language not in ("Chinese", "Japanese", "Thai", "Lao", "Khmer", "Burmese"):
                assert term in words_of(text)
                continue
            end = text.index(term) + len(term)
            assert unicodedata.category(term[0]) not in MARKS, "begins with a mark"
            assert end == len(text) or unicodedata.category(text[end]) not in MARKS, "loses a mark"


MARKS = ("Mn", "Mc", "Me")


def words_of(text: str) -> list[str]:
    return [word.strip(".,।") for word in text.lower().split()]


def test_auxiliary_words_and_contractions_are_no_terms() -> None:
    """Travel's questions ("Does the hotel offer wifi?") made "does" the most frequent term. What is
    left of a contraction may be a word or a name of its own, and other languages elide."""
    text = (
        "Does it? It doesn't, it didn’t, it won't, and it shouldnt; we've asked, they’ll say, "
        "having done so. Don Pasquale won. L'eau, dell'arte, rock'n'roll, O'Reilly."
    )
    kept = "asked say pasquale won eau dell arte rock roll reilly"
    assert [word for word in content_words(text) if word != "don"] == kept.split()
    assert "don" in content_words("Don Pasquale doesn't")
    (terms,) = salient_terms([Chunk("c", text, "", "c", 0, len(text))], limit=20)
    assert not {"does", "didn", "doesn", "ve", "ll", "having"} & set(" ".join(terms).split())


def test_seeded_per_chunk() -> None:
    make = partial(synthesize_queries, kinds=SEARCHED)
    one, again, other = (make(CHUNKS, seed=seed) for seed in (1, 1, 2))
    assert one == again != other
    few = make(CHUNKS[:2], seed=1, per_chunk=1)
    assert few == [
        query for query in make(CHUNKS, seed=1, per_chunk=1) if query.chunk_id.startswith("rivers")
    ]
    assert len(few) == 2
    assert make([], seed=0) == []


def test_user_queries(tmp_path: Path) -> None:
    rows = [
        {
            "text": "Where are paddle steamers?",
            "doc_id": "rivers",
        },  # a document cut in two: the chunk that fits best
        {"text": "Which river carries coal?", "doc_id": "rivers#0"},
        {"text": "How does a glacier form?", "doc_id": "glaciers"},
        {"text": "Who?", "doc_id": "typo"},
    ]
    path = tmp_path / "queries.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(
        RefineFastWarning,
        match=r'1 of 4 queries are skipped .* the first "typo" at .*queries.jsonl:4',
    ):
        queries = load_queries(path, CHUNKS)
    assert [(query.chunk_id, query.kind) for query in queries] == [
        ("rivers#1", "user"),
        ("rivers#0", "user"),
        ("glaciers", "user"),
    ]


def test_the_chunks_of_a_document_are_read_once_for_all_its_queries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    fit, fitted = TfidfVectorizer.fit_transform, []

    def counted(self: TfidfVectorizer, texts: list[str]) -> object:
        fitted.append(len(texts))
        return fit(self, texts)

    monkeypatch.setattr(TfidfVectorizer, "fit_transform", counted)
    asked = [("Where are paddle steamers?", 1), ("Which river carries coal?", 0)] * 3
    path = tmp_path / "queries.jsonl"
    rows = [{"text": f"{text} {i}", "doc_id": "rivers"} for i, (text, _) in enumerate(asked)]
    path.write_text("\n".join(map(json.dumps, rows)))
    queries = load_queries(path, CHUNKS)
    assert [query.chunk_id for query in queries] == [f"rivers#{part}" for _, part in asked]
    assert fitted == [2]


def test_a_document_without_words_gives_its_first_chunk(tmp_path: Path) -> None:
    chunks = [Chunk(f"lines#{i}", "----", "", "lines", 0, 4) for i in range(2)]
    path = tmp_path / "queries.jsonl"
    path.write_text('{"text": "Which line?", "doc_id": "lines"}')
    assert [query.chunk_id for query in load_queries(path, chunks)] == ["lines#0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "Why?"}', r'queries.jsonl:1 has no field "doc_id" but only .*; add it'),
        (
            '{"text": " ", "doc_id": "glaciers"}',
            r'queries.jsonl:1: the field "text" is empty; write the query or delete the row',
        ),
        (
            '{"text": 1.5, "doc_id": "glaciers"}',
            r'queries.jsonl:1: the field "text" is 1.5; it must be a string',
        ),
        (
            '{"text": "Why?", "doc_id": "typo"}',
            r'none of its 1 queries names a document, the first "typo" at .*such as \'rivers#0\'',
        ),
        ("", r"queries.jsonl holds no queries; add some"),
    ],
)
def test_bad_user_queries(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "queries.jsonl").write_text(content)
    with pytest.raises(RefineFastError, match=message):
        load_queries(tmp_path / "queries.jsonl", CHUNKS)


def beir(folder: Path) -> Path:
    (folder / "qrels").mkdir()
    corpus = [{"_id": chunk.id, "text": chunk.text} for chunk in CHUNKS]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, corpus)))
    texts = {
        "q1": "Where is coal carried?",
        "q2": "How does a glacier form?",
        "q3": "how does a  glacier FORM?",
        "q4": "Unjudged?",
    }
    (folder / "queries.jsonl").write_text(
        "\n".join(json.dumps({"_id": id, "text": text}) for id, text in texts.items())
    )
    header = "query-id\tcorpus-id\tscore\n"
    (folder / "qrels" / "train.tsv").write_text(
        header + "q1\trivers#0\t1\nq1\trivers#1\t0\nq2\tglaciers\t1\n"
    )
    (folder / "qrels" / "test.tsv").write_text(header + "q3\tglaciers\t1\n")
    return folder


def test_beir_queries_that_the_test_asks_too_are_left_out(tmp_path: Path) -> None:
    """The user is told how many."""
    said: list[str] = []
    assert load_queries(beir(tmp_path), CHUNKS, say=said.append) == [
        Query("Where is coal carried?", "rivers#0", "user")
    ]
    assert said == [
        "  1 of 2 queries of the split train are left out, since other splits ask them too"
    ]
    (tmp_path / "qrels" / "test.tsv").unlink()
    assert [query.chunk_id for query in load_queries(tmp_path, CHUNKS)] == ["rivers#0", "glaciers"]


@pytest.mark.parametrize("name", [*DEV_SPLITS[1:], None])
def test_other_names_of_the_split_dev(tmp_path: Path, name: str | None) -> None:
    """``dev`` itself wins, and the other is then a split like the test."""
    folder = beir(tmp_path)
    judged = "query-id\tcorpus-id\tscore\nq1\trivers#0\t1\nq4\tglaciers\t1\n"
    (folder / "qrels" / f"{name or 'validation'}.tsv").write_text(judged)
    if name is None:
        (folder / "qrels" / "dev.tsv").write_text(f"{judged}q2\tglaciers\t1\n")
        (folder / "qrels" / "test.tsv").unlink()
    said: list[str] = []
    found = load_dev_queries(folder, CHUNKS, say=said.append)
    if name is None:
        assert [query.text for query in found] == ["How does a glacier form?"]
        assert said == [
            "  2 of 3 queries of the split dev are left out, since other splits ask them too"
        ]
    else:
        assert [query.text for query in found] == ["Where is coal carried?", "Unjudged?"]
        assert said == []


def test_the_texts_of_queries_are_read_once_for_all_splits(tmp_path: Path, monkeypatch) -> None:
    folder = beir(tmp_path)
    for split in ("dev", "validation", "other"):
        shutil.copy(folder / "qrels" / "test.tsv", folder / "qrels" / f"{split}.tsv")
    read: list[Path] = []
    monkeypatch.setattr(
        "refine_fast.pipeline.corpus.beir.read_jsonl",
        lambda path: read.append(path) or read_jsonl(path),
    )
    assert len(judged_queries(folder, ["dev", "validation", "other", "test"])) == 4
    assert read == [folder / "queries.jsonl"]
    assert judged_queries(folder, []) == []
    assert len(read) == 1


def test_the_split_dev_of_a_beir_folder(tmp_path: Path) -> None:
    """Without what the test asks too, and with what train does, which leaves it out."""
    folder = beir(tmp_path)
    assert load_dev_queries(folder, CHUNKS) == load_dev_queries(folder / "queries.jsonl", []) == []
    (folder / "qrels" / "dev.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\trivers#1\t1\nq3\tglaciers\t1\n"
        "q4\tunknown\t1\nq4\tglaciers\t0\n"
    )
    dev = [Query("Where is coal carried?", "rivers#1", "user")]
    unknown = r'1 of 3 queries are skipped .* the first "unknown" at query q4 of dev'
    with pytest.warns(RefineFastWarning, match=unknown):
        assert load_dev_queries(folder, CHUNKS) == dev
    (folder / "qrels" / "test.tsv").unlink()
    with pytest.warns(RefineFastWarning, match=unknown):
        asked = [query.text for query in load_dev_queries(folder, CHUNKS)]
    assert asked == ["Where is coal carried?", "how does a  glacier FORM?"]
    with pytest.raises(RefineFastError, match=r"ask every query of train\.tsv too"):
        load_queries(folder, CHUNKS)
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq3\tglaciers\t0\n")
    assert load_dev_queries(folder, CHUNKS) == []  # its grades are hidden


@pytest.mark.parametrize("empty", ["q1", "q3", "q4"])
def test_an_empty_query_of_a_beir_folder_is_refused(tmp_path: Path, empty: str) -> None:
    """In what is trained on or chooses the weight; a test counts it as BEIR does."""
    folder = beir(tmp_path)
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq4\tglaciers\t1\n")
    rows = [json.loads(line) for line in (folder / "queries.jsonl").read_text().splitlines()]
    rows = [{**row, "text": " "} if row["_id"] == empty else row for row in rows]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = {"q1": load_queries, "q4": load_dev_queries}
    for load in (load_queries, load_dev_queries):
        if asked.get(empty) is load:
            with pytest.raises(RefineFastError, match=f": query {empty} is empty; write the query"):
                load(folder, CHUNKS)
        else:
            load(folder, CHUNKS)


@pytest.mark.parametrize("judged", ["q3\tglaciers\t0", "q3\tunknown\t1", ""])
def test_beir_queries_beside_a_split_that_hides_its_judgements(tmp_path: Path, judged: str) -> None:
    """Its queries are left out all the same."""
    folder = beir(tmp_path)
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}\n")
    kept = ["rivers#0"] if judged else ["rivers#0", "glaciers"]
    assert [query.chunk_id for query in load_queries(folder, CHUNKS)] == kept


@pytest.mark.parametrize(("name", "count"), [(SMALL, 149), ("squad", 2611)])
def test_real_train_queries(name: str, count: int) -> None:
    """All of train, less what dev or test ask too: 1 of 150, and 3 of 2,614."""
    from refine_fast.pipeline.corpus.chunking import chunk_documents
    from refine_fast.pipeline.corpus.documents import load_documents

    folder = folder_of(name)

    class Words:  # a BEIR passage is never cut, so the tokenizer only has to exist
        def num_special_tokens_to_add(self) -> int:
            return 2

    queries = load_queries(folder, chunk_documents(load_documents(folder), Words(), max_tokens=256))
    assert len(queries) == count
