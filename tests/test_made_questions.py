"""Queries that are made by rules of grammar, and what keeps them specific."""

from dataclasses import replace

import pytest

from refine_fast.errors import RefineFastError
from refine_fast.pipeline.config import RunConfig
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.definitions import definition_question
from refine_fast.pipeline.queries.english import english_questions
from refine_fast.pipeline.queries.prose import is_whole, not_prose
from refine_fast.pipeline.queries.query import KINDS_IN_TURN, MADE_KINDS
from refine_fast.pipeline.queries.salient import Rarity
from refine_fast.pipeline.queries.synthetic import synthesize_queries


@pytest.mark.parametrize(
    ("sentence", "form", "question"),
    [
        (
            "The crane was built by Arrol in 1908.",
            "who",
            "Who built the crane in 1908?",
        ),
        (
            "The crane was built by Arrol in 1908.",
            "when",
            "When was the crane built by Arrol?",
        ),
        (
            "The ode was written by Tesla in Prague.",
            "who",
            "Who wrote the ode in Prague?",
        ),
        (
            "In 1976, BankAmericard was renamed and spun off into a separate company.",
            "when",
            "When was BankAmericard renamed and spun off into a separate company?",
        ),
        (
            "On 7 January 1900, Tesla left Colorado Springs (Colorado).",
            "when",
            "When did Tesla leave Colorado Springs?",
        ),
        (
            "However, the SNP took 16 seats from Labour, with many of their figures lost.",
            "how many",
            "How many seats did the SNP take from Labour?",
        ),
        (
            "Trial division is a deterministic algorithm because it always gives the same answer.",
            "why",
            "Why is trial division a deterministic algorithm?",
        ),
        (
            "The polymath Shen Kuo formulated a hypothesis for land formation in Dongting.",
            "where",
            "Where did the polymath Shen Kuo formulate a hypothesis for land formation?",
        ),
        (
            "The extent of Hadrian's Wall was 73 miles.",
            "what is",
            "What was the extent of Hadrian's Wall?",
        ),
        (
            "Prime numbers are also used for hash tables and pseudorandom number generators.",
            "subject",
            "What is used for hash tables and pseudorandom number generators?",
        ),
        (
            "The lock, however, was closed by Arrol in 1908.",
            "when",
            "When was the lock closed by Arrol?",
        ),
        (
            "Twelve actors have headlined the series as the Doctor.",
            "subject",
            "How many actors have headlined the series as the Doctor?",
        ),
        (
            "Nikola Tesla died alone in the New Yorker Hotel.",
            "subject",
            "Who died alone in the New Yorker Hotel?",
        ),
    ],
)
def test_a_sentence_becomes_a_question(sentence: str, form: str, question: str) -> None:
    assert english_questions(sentence)[form] == question


@pytest.mark.parametrize(
    "sentence",
    [
        "He had been replaced by Abercrombie as commander in chief in 1757.",  # who is he?
        "This contrasts with the formal style of prayers in the House.",
        "The people who lived in the valley were moved by the army.",  # which verb is the clause's?
        "The results show that the vaccine protects mice in the long run.",
        "What was built by Arrol in 1908?",
        "Only in the spring of 1908 was the crane built.",
    ],
)
def test_no_question_where_the_clause_is_uncertain(sentence: str) -> None:
    assert english_questions(sentence) == {}


@pytest.mark.parametrize("means", ["heating the ore", "placing rows of bricks", "slow cooling"])
def test_no_activity_is_asked_for_as_an_agent(means: str) -> None:
    assert "who" not in english_questions(f"The steel was formed by {means} in an open furnace.")
    asked = english_questions("The crane was built by Lessing in 1908.")["who"]
    assert asked == "Who built the crane in 1908?"


def test_a_negated_sentence_is_not_asked_for_its_date() -> None:
    assert "when" not in english_questions("The crane was not used by the port in 1908.")


@pytest.mark.parametrize(
    ("language", "sentence", "question"),
    [
        ("en", "A dictionary display is a series of items.", "What is a dictionary display?"),
        ("de", "Ein Stauwerk ist eine Anlage im Fluss.", "Was ist ein Stauwerk?"),
        ("fr", "La photosynthèse est un processus.", "Qu'est-ce que la photosynthèse ?"),
        ("es", "La fotosíntesis es un proceso.", "¿Qué es la fotosíntesis?"),
        ("ru", "Фотосинтез — это процесс в растениях.", "Что такое Фотосинтез?"),
        ("zh", "光合作用是一种化学过程。", "什么是光合作用？"),
        ("ja", "光合成は、植物の化学反応である。", "光合成とは何ですか？"),
        ("ko", "광합성은 식물의 화학 반응이다.", "광합성에 대해 알려 주세요"),
        ("th", "ปะการังคือสัตว์ทะเล", "ปะการังคืออะไร"),
        ("vi", "Quang hợp là quá trình hóa học.", "Quang hợp là gì?"),
        ("en", "It is a series of items.", None),
        ("en", "The series, of which there are two, is a novelty.", None),
        ("zh", "这是一种化学过程。", None),
        ("sw", "Maji ni kitu cha lazima.", None),
    ],
)
def test_definitions(language: str, sentence: str, question: str | None) -> None:
    assert definition_question(sentence, language) == question


SENTENCES = (
    "The crane of Port{i} was built by Arrol{i} near Ness{i} in 19{i:02}. ",
    "Quay {i} is a dock for the ferries of island {i}. ",
    "Pilots of harbour {i} board the tankers near lighthouse {i} every morning.",
)


def port(i: int, sentences: tuple[str, ...] = SENTENCES) -> Chunk:
    text = "".join(sentences).format(i=i)
    return Chunk(f"c{i}", text, "Ports of the coast", f"f{i}", 0, len(text))


def test_kinds_can_be_chosen() -> None:
    chunks = [port(i) for i in range(20)]
    for kind in ("question", "keywords", "crop"):
        made = synthesize_queries(chunks, seed=0, per_chunk=1, kinds=(kind,))
        assert {query.kind for query in made} == {kind}
        assert 2 * len({query.chunk_id for query in made}) > len(chunks)
    default = synthesize_queries(chunks, seed=0, per_chunk=4)
    assert {query.kind for query in default} == set(KINDS_IN_TURN)


def test_a_kind_that_a_chunk_does_not_offer_is_replaced() -> None:
    chunks = [port(i, SENTENCES[2:]) for i in range(20)]  # no definition
    alone = synthesize_queries(chunks, seed=0, per_chunk=1, kinds=("definition",))
    mixed = synthesize_queries(chunks, seed=0, per_chunk=2, kinds=("definition", "cloze"))
    assert alone == []
    assert {query.kind for query in mixed} == {"cloze"}


def test_a_specific_text_shares_rare_words_with_its_passage() -> None:
    passages = [port(i).text for i in range(40)]
    rarity = Rarity(passages)
    assert rarity.is_specific("Who built Arrol7 in 1907?", passages[7])
    assert not rarity.is_specific("Who built the crane of the port?", passages[7])
    assert not rarity.is_specific("Who built Arrol8 in 1908?", passages[7])  # another's words


def test_half_of_the_queries_name_a_title_that_chunks_share() -> None:
    shared = [port(i) for i in range(100)]
    alone = [replace(chunk, title=f"Port {i}") for i, chunk in enumerate(shared)]
    without = [replace(chunk, title="") for chunk in shared]
    made, unnamed, untitled = (
        [query.text for query in synthesize_queries(chunks, seed=0, per_chunk=3)]
        for chunks in (shared, alone, without)
    )
    title = "Ports of the coast: "
    named = [text for text in made if text.startswith(title)]
    assert 0.4 < len(named) / len(made) < 0.6
    assert [text.removeprefix(title) for text in made] == unnamed == untitled


def test_a_query_with_the_words_of_its_title_is_not_given_it_again() -> None:
    chunks = [replace(port(i), title="crane") for i in range(20)]
    made = [query.text for query in synthesize_queries(chunks, seed=0, per_chunk=3)]
    named = [text for text in made if text.startswith("crane: ")]
    assert named
    assert not any("crane" in text.removeprefix("crane: ") for text in named)


def test_a_shared_title_is_joined_by_a_term_that_it_does_not_hold() -> None:
    chunks = [port(i) for i in range(20)]
    made = synthesize_queries(chunks, seed=0, per_chunk=1, kinds=("title",))
    for query in made:
        _, _, term = query.text.partition("Ports of the coast ")
        assert term
        assert not set(term.split()) & {"ports", "coast"}


def test_a_collection_of_a_few_passages_has_spans() -> None:
    """Few words in it are rare."""
    made = synthesize_queries([port(i) for i in range(3)], seed=0, per_chunk=2, kinds=("span",))
    assert {query.chunk_id for query in made} == {"c0", "c1", "c2"}
    copies = [port(0), replace(port(0), id="c1")]
    made = synthesize_queries(copies, seed=0, per_chunk=2, kinds=("span",))
    assert [query.chunk_id for query in made] == ["c0", "c1"]


def test_spans_tell_their_passage_from_the_others() -> None:
    """No words of the title that it shares with them, no singular beside its plural, no numbers
    in pieces, and not only words that the others have too."""
    text = (
        "Ports hang their cargo on an N{i}crane. N{i}cranes of one port weigh 1{i:02},500.5 tons."
    )
    chunks = [port(i, (text,)) for i in range(40)]
    spans = [
        query
        for query in synthesize_queries(chunks, seed=0, per_chunk=4, kinds=("span",))
        if query.kind == "span"
    ]
    assert len(spans) > len(chunks)
    rarity = Rarity([chunk.text for chunk in chunks])
    for query in spans:
        passage = chunks[int(query.chunk_id[1:])].text
        words = query.text.removeprefix("Ports of the coast: ").split()
        assert rarity.is_specific(query.text, passage)
        assert not {"port", "ports"} & set(words)
        assert len({word.removesuffix("s") for word in words}) == len(words)
        assert set(words) <= {word.strip(".") for word in passage.lower().split()}


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("The crane (1908) lifts twelve tonnes.", True),
        ("2006) , linear dichroism (Pacheco-Gomez et al.,", False),
        ("exception is raised and the iterator will have ended", False),
        ("Forms differ (Pacheco-Gomez et al.,", False),
        ("春天来了，河水上涨。", True),
    ],
)
def test_fragments_are_told_from_sentences(text: str, whole: bool) -> None:
    assert is_whole(text) is whole


@pytest.mark.parametrize(
    "text",
    [
        "32. Kash JC, Basler CF, Garcia-Sastre A, et al. Global host response. J Virol. "
        "2004;78:9499-511.",
        "Basler CF, O'Neill M. J. and Garcia-Sastre A, Global host response to an infection",
        "Latest developments in control on Feb 15. Retrieved from http://en.nhc.gov.cn/2020.",
        "The dynamics of the outbreak, doi: 10.1000/182 and its supplement.",
    ],
)
def test_references_are_no_prose(text: str) -> None:
    assert not_prose(text) == "reference"


def test_rules_of_a_grammar_are_no_prose() -> None:
    assert not_prose('with_stmt ::= "with" with_item suite and the rest of it') == "code"


def test_the_setting() -> None:
    assert RunConfig(out="run", query_kinds="question, cloze").query_kinds == ("question", "cloze")
    assert RunConfig(out="run").made_kinds == KINDS_IN_TURN
    assert RunConfig(out="run", llm="smollm2").made_kinds == KINDS_IN_TURN
    assert RunConfig(out="run", llm="smollm2", query_kinds="none").made_kinds == ()
    server = {"llm": "http://localhost/v1", "llm_model": "large"}
    assert RunConfig(out="run", **server).made_kinds == ()
    assert RunConfig(out="run", **server, query_kinds="crop").made_kinds == ("crop",)
    both = RunConfig(out="run", llm="smollm2")
    assert (both.written_per_chunk, both.made_per_chunk) == (2, 3)
    both = RunConfig(out="run", llm="smollm2", queries_per_chunk=4)
    assert (both.written_per_chunk, both.made_per_chunk) == (4, 4)
    user = {"queries": __file__}
    assert RunConfig(out="run", **user).made_kinds == ()
    assert RunConfig(out="run", **user, query_kinds="crop").made_kinds == ("crop",)
    assert RunConfig(out="run", **user, query_kinds="none").made_kinds == ()
    with pytest.raises(RefineFastError, match="query_kinds: none leaves no queries; name kinds"):
        RunConfig(out="run", query_kinds="none")
    with pytest.raises(RefineFastError, match=r"query_kinds: riddle must be kinds of query, of cl"):
        RunConfig(out="run", query_kinds="riddle")
    assert set(KINDS_IN_TURN) < set(MADE_KINDS)
