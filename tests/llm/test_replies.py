"""What is kept of replies as models write them."""

import json

import numpy as np
import pytest
from retrieval_sets import SMALL, folder_of, pairs, texts

from refine_fast.pipeline.queries.llm import filters
from refine_fast.pipeline.queries.llm.reply_parser import parse_numbers, parse_queries

PASSAGE = (
    "The Oder lighthouse was finished in 1908 by the harbour board of Stettin. Its lamp burnt rape "
    "oil until 1931, when an electric arc replaced it. Visitors climb 204 steps to the gallery, "
    "which is closed during storms."
)
A, B = "When was the Oder lighthouse completed?", "What fuel did the old lamp use?"
LIT, OIL = "Oder lights were oil-fired", "oder lighthouse lamp oil"
BOTH = json.dumps({"queries": [{"kind": "question", "text": A}, {"kind": "question", "text": B}]})

# (reply, how it was read, queries kept, reasons of the drops)
REPLIES = {
    "schema": (BOTH, "schema", [A, B], {}),
    "schema, spaces around": (f"\n\n  {BOTH}\n", "schema", [A, B], {}),
    "schema, none found": ('{"queries": []}', "schema", [], {}),
    "fence": (f"```json\n{BOTH}\n```", "json", [A, B], {}),
    "fence without an end": (f"```json\n{BOTH}", "json", [A, B], {}),
    "prose before and after": (
        f"Sure! Here are the queries:\n{BOTH}\nLet me know if you need more.",
        "json",
        [A, B],
        {},
    ),
    "reasoning first": (
        f"<think>The passage {{is}} about ... [1]</think>\n{BOTH}",
        "schema",
        [A, B],
        {},
    ),
    "reasoning in brackets": (
        f"[THINK]What to ask?\nTwo things.[/THINK]{BOTH}",
        "schema",
        [A, B],
        {},
    ),
    "reasoning in another tag": (
        f"<seed:think>1. What to ask?</seed:think>\n1. {A}",
        "lines",
        [A],
        {},
    ),
    "reasoning between diamonds": (
        f"◁think▷Hm.\n- Two?◁/think▷1. {A}\n2. {B}",
        "lines",
        [A, B],
        {},
    ),
    "harmony": (
        "<|channel|>analysis<|message|>First a question {1}.<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{BOTH}<|return|>",
        "schema",
        [A, B],
        {},
    ),
    "harmony, lines": (
        "<|channel|>analysis<|message|>1. First a question.<|end|><|start|>assistant"
        f"<|channel|>final<|message|>1. {A}\n2. {B}",
        "lines",
        [A, B],
        {},
    ),
    "harmony without its marks": (
        f"analysisWe need queries.assistantfinal1. {A}\n2. {B}",
        "lines",
        [A, B],
        {},
    ),
    "a channel of thought": (f"<|channel>thought\n1. Hm?\n<channel|>{BOTH}", "schema", [A, B], {}),
    "analysis without an end": (
        "<|channel|>analysis<|message|>We need",
        "nothing",
        [],
        {"no query in the reply": 1},
    ),
    "reasoning without an end": (
        "<think>First I look at the lamp",
        "nothing",
        [],
        {"no query in the reply": 1},
    ),
    "list of texts": (json.dumps([A, B]), "json", [A, B], {}),
    "object of texts": (json.dumps({"queries": [A, B]}), "json", [A, B], {}),
    "key of another name": (
        json.dumps({"questions": [{"question": A}, {"question": B}]}),
        "json",
        [A, B],
        {},
    ),
    "by kind": (
        json.dumps({"question": [A], "keywords": ["lighthouse lamp rape oil"]}),
        "json",
        [A, "lighthouse lamp rape oil"],
        {},
    ),
    "numbered keys": (json.dumps({"1": A, "2": B}), "json", [A, B], {}),
    "query1, query2": (json.dumps({"query1": A, "query_2": B}), "json", [A, B], {}),
    "one object": (json.dumps({"kind": "question", "text": A}), "json", [A], {}),
    "nested twice": (json.dumps({"result": {"queries": [{"text": A}]}}), "json", [A], {}),
    "another field": (
        json.dumps({"queries": [{"text": A, "kind": "question", "answer": "1908"}]}),
        "json",
        [A],
        {},
    ),
    "a line break in a string": (
        '{"queries": [{"kind": "question", "text": "When was the\nOder lighthouse completed?"}]}',
        "json",
        [A],
        {},
    ),
    "comma at the end": (f'{{"queries": ["{A}", "{B}",]}}', "repaired", [A, B], {}),
    "single quotes": (f"{{'queries': ['{A}', '{B}']}}", "repaired", [A, B], {}),
    "cut by the length": (BOTH[:-10], "repaired", [A], {"cut off": 1}),
    "cut after the last text": (BOTH[:-3], "repaired", [A, B], {}),
    "cut within the first text": (
        '{"queries": [{"kind": "question", "text": "When was',
        "repaired",
        [],
        {"cut off": 1},
    ),
    "bracket missing": (f'{{"queries": ["{A}", "{B}"', "repaired", [A, B], {}),
    "quote missing": (f'{{"queries": ["{A}, "{B}"]}}', "repaired", None, {}),
    "comment inside": (f'{{"queries": ["{A}", // the date\n"{B}"]}}', "repaired", [A, B], {}),
    "numbered": (f"1. {A}\n2. {B}", "lines", [A, B], {}),
    "numbered with )": (f"1) {A}\n2) {B}", "lines", [A, B], {}),
    "numbered with []": (f"[1] {A}\n[2] {B}", "lines", [A, B], {}),
    "bullets": (f"- {A}\n* {B}", "lines", [A, B], {}),
    "bullet points": (f"• {A}\n• {B}", "lines", [A, B], {}),
    "Q1:": (f"Q1: {A}\nQ2: {B}", "lines", [A, B], {}),
    "bold, in three layers": (f'1. **"{A}"**\n2. **{B}**', "lines", [A, B], {}),
    "preamble, numbered": (
        f"Here are 2 questions:\n\n1. {A}\n2. {B}",
        "lines",
        [A, B],
        {"preamble": 1},
    ),
    "preamble, plain": (
        f"Here are two questions for you:\n{A}\n{B}",
        "lines",
        [A, B],
        {"preamble": 1},
    ),
    "preamble alone": (
        "Here are 2 questions:",
        "nothing",
        [],
        {"preamble": 1, "no query in the reply": 1},
    ),
    "preamble as an element": (
        json.dumps(["Here are 2 questions:", A]),
        "json",
        [A],
        {"preamble": 1},
    ),
    "plain lines": (f"{A}\n{B}", "lines", [A, B], {}),
    "a number is no marker": (
        "3.5 tonnes of oil were burnt by which lamp?",
        "lines",
        ["3.5 tonnes of oil were burnt by which lamp?"],
        {},
    ),
    "a genus is no marker": (
        "E. coli in the well of which lighthouse?",
        "lines",
        ["E. coli in the well of which lighthouse?"],
        {},
    ),
    "empty": ("", "nothing", [], {"no query in the reply": 1}),
    "blank": (" \n\t ", "nothing", [], {"no query in the reply": 1}),
    "null": ("null", "lines", [], {"too short": 1}),
    "empty strings": (json.dumps({"queries": ["", "   ", A]}), "json", [A], {}),
    "placeholders": (
        json.dumps({"queries": ["...", "<query 1>", "Question 2", A]}),
        "json",
        [A],
        {"empty": 3},
    ),
    "one word": (json.dumps(["Stettin", A]), "json", [A], {"too short": 1}),
    "an essay": (
        json.dumps(["What " + "about the lamp and the oil " * 12 + "?", A]),
        "json",
        [A],
        {"too long": 1},
    ),
    "copy": (
        json.dumps(["Visitors climb 204 steps to the gallery, which is closed during storms.", A]),
        "json",
        [A],
        {"copy of the passage": 1},
    ),
    "statement": (
        '{"queries": [{"kind": "question", "text": "Lighthouses on the Oder were oil-lit."}]}',
        "schema",
        [],
        {"not a question": 1},
    ),
    "statement as a claim": (
        '{"queries": [{"kind": "claim", "text": "Oder lights were oil-fired"}]}',
        "schema",
        ["Oder lights were oil-fired"],
        {},
    ),
    "question without a mark": (
        json.dumps(["who built the oder lighthouse"]),
        "json",
        ["who built the oder lighthouse"],
        {},
    ),
    "speaks of the passage": (
        json.dumps(["According to the passage, who built it?", A]),
        "json",
        [A],
        {'refers to "the passage"': 1},
    ),
    "German": (
        json.dumps(["Wann wurde der Leuchtturm an der Oder fertiggestellt?", A]),
        "json",
        [A],
        {"wrong language": 1},
    ),
    "Chinese": (json.dumps(["奥得河灯塔是什么时候建成的?", A]), "json", [A], {"wrong language": 1}),
    "too many": (
        json.dumps([A, B, "How many steps lead up?", "Who closes the gallery?", "Where is it?"]),
        "json",
        None,
        {"more than asked for": 1},
    ),
    "numbers": ("[1, 2, 3]", "lines", [], {"empty": 1}),
    "nonsense": ("@@@@", "lines", [], {"empty": 1}),
    "deep nesting": ("[" * 5000, "nothing", [], {"no query in the reply": 1}),
    "refusal": (
        "I can't help with that.",
        "nothing",
        [],
        {"refusal": 1, "no query in the reply": 1},
    ),
    "question and answer": (
        f"Q: {A}\nA: It was completed in 1908.\n\nQ: {B}\nA: Rape oil.",
        "lines",
        [A, B],
        {"beside the list": 2},
    ),
    "answer behind": (
        json.dumps([f"{A} Answer: 1908", f"{B} (asks for the fuel)"]),
        "json",
        [A, B],
        {},
    ),
    "answer behind, bare": (json.dumps([f"{A} 1908.", B]), "json", [B], {"carries its answer": 1}),
    "explained line by line": (
        f"1. {A}\n   - This asks for the date.\n2. {B}\n   - This asks for the fuel.",
        "lines",
        [A, B],
        {"beside the list": 2},
    ),
    "on one line": (f"1. {A} 2. {B}", "lines", [A, B], {}),
    "headings of the kinds": (
        f"**Questions:**\n- {A}\n\n**Claims:**\n- Oder lights were oil-fired",
        "lines",
        [A, LIT],
        {},
    ),
    "kind before each": (
        f"question: {A}\nkeywords: oder lighthouse lamp oil\nclaim: {LIT}",
        "lines",
        [A, OIL, LIT],
        {},
    ),
    "bold kind before each": (f"**Question**: {A}\n**Claim 1:** {LIT}", "lines", [A, LIT], {}),
    "YAML": (
        f"queries:\n  - kind: question\n    text: {A}\n  - kind: claim\n    text: {LIT}",
        "lines",
        [A, LIT],
        {"preamble": 1},
    ),
    "an object a line": (
        f'{{"kind": "question", "text": "{A}"}}\n{{"kind": "claim", "text": "{LIT}"}}',
        "json",
        [A, LIT],
        {},
    ),
    "an object a line, cut": (
        f'{{"text": "{A}"}}\n{{"kind": "question", "text": "What fu',
        "json",
        [A],
        {"cut off": 1},
    ),
    "two fences": (f'```json\n["{A}"]\n```\nand\n```json\n["{B}"]\n```', "json", [A, B], {}),
    "JSON in a string": (json.dumps(BOTH), "schema", [A, B], {}),
    "Python": (f'```python\nqueries = ["{A}", "{B}"]\n```', "json", [A, B], {}),
    "tool call": (
        f'<tool_call>{{"name": "f", "arguments": {BOTH}}}</tool_call>',
        "json",
        [A, B],
        {},
    ),
    "marks of a chat template": (f"assistant: {A}<|im_end|>", "lines", [A], {}),
    "end of sequence": (f"1. {A}\n2. {B}</s>", "lines", [A, B], {}),
    "reasoning without a beginning": (
        f"I look at the lamp first.\n</think>\n{A}",
        "lines",
        [A],
        {},
    ),
    "arrows and emoji": (f"→ {A}\n👉 {B}", "lines", [A, B], {}),
    "roman numbers": (f"i. {A}\nii. {B}", "lines", [A, B], {}),
    "table": (
        f"| kind | text |\n|---|---|\n| question | {A} |",
        "lines",
        [],
        {"line of a table": 2, "empty": 1},
    ),
    "closing remark": (
        f"{A}\n{B}\nThese questions cover different facts.",
        "lines",
        [A, B],
        {"preamble": 1},
    ),
    "preamble without a colon": (
        f"Absolutely! Here you go\n{A}\n{B}",
        "lines",
        [A, B],
        {"preamble": 1},
    ),
    "title": (f"Generated queries\n\n{A}\n{B}", "lines", [A, B], {"preamble": 1}),
    "says that there are none": (
        "No queries can be written.",
        "nothing",
        [],
        {"refusal": 1, "no query in the reply": 1},
    ),
    "refusal as an element": (
        json.dumps(["Unfortunately there is too little to ask."]),
        "json",
        [],
        {"refusal": 1},
    ),
    "loop": (
        json.dumps(["When was the the the the the the lamp?", A]),
        "json",
        [A],
        {"repeats itself": 1},
    ),
    "speaks of what is mentioned": (
        json.dumps(
            [
                "What year is mentioned?",
                "What is this article about?",
                "Wer baute laut dem Text den Turm?",
                A,
            ]
        ),
        "json",
        [A],
        {'refers to "the passage"': 3},
    ),
    "kind in other letters": (
        json.dumps({"queries": [{"kind": "Keyword", "text": OIL}]}),
        "schema",
        [OIL],
        {},
    ),
    "echo of the prompt": (
        json.dumps(["How do I get from the example to the exam?", A]),
        "json",
        [A],
        {"copy of the prompt": 1},
    ),
    "short Spanish": (
        json.dumps(["¿Cuándo se terminó el faro del Oder?", A]),
        "json",
        [A],
        {"wrong language": 1},
    ),
    "German keywords": (
        '{"queries": [{"kind": "keywords", "text": "Leuchtturm Rapsöl Lampe"}]}',
        "schema",
        [],
        {"wrong language": 1},
    ),
    "a key a kind": (
        json.dumps({"question": A, "keywords": OIL, "claim": LIT, "answer": "1908"}),
        "json",
        [A, OIL, LIT],
        {},
    ),
    "an object a kind": (json.dumps([{"question": A}, {"claim": LIT}]), "json", [A, LIT], {}),
    "quoted lines": (f'Q1: "{A}"\nQ2: "{B}"', "lines", [A, B], {}),
    "half a surrogate pair": (
        '["\\ud83d\\ude80 \\ud83d What fuel did the old lamp use?"]',
        "json",
        [f"\U0001f680 \ufffd {B}"],
        {},
    ),
    "error page": ("<html><body>502 Bad Gateway</body></html>", "lines", [], {"markup": 1}),
}


@pytest.mark.parametrize("name", REPLIES)
def test_what_is_kept(name: str) -> None:
    reply, how, kept, dropped = REPLIES[name]
    prompt = 'Write like this: "How do I get from the example to the exam?"'
    accepted = filters.accept(
        parse_queries(reply), PASSAGE, ["question", "keywords", "claim"], 4, prompt
    )
    texts = [" ".join(text.split()) for _, text in accepted.queries]
    assert accepted.how == how
    assert kept is None or texts == kept
    assert accepted.dropped == dropped


def test_the_last_line_of_a_reply_that_was_cut() -> None:
    accepted = filters.accept(
        parse_queries(f"1. {A}\n2. What fuel did the", cut=True), PASSAGE, ["question"], 4
    )
    assert accepted.queries == [("question", A)]
    assert accepted.dropped == {"cut off": 1}


@pytest.mark.parametrize("end", ['"What is \\"rape oil', '{"kind": "quest', '{"text": "'])
def test_the_last_text_of_a_reply_that_was_cut(end: str) -> None:
    """Within an escape's text, within another field, before its first letter."""
    parsed = parse_queries(f'{{"queries": ["{A}", {end}', cut=True)
    assert [candidate.text for candidate in parsed.candidates] == [A]


@pytest.mark.parametrize(
    ("reply", "numbers"),
    [
        ('{"answerable": [1, 3]}', [1, 3]),
        ('```json\n{"answerable": ["2"]}\n```', [2]),
        ('{"answerable": []}', []),
        ("[1]", [1]),
        ("```json\n[1, 3]\n```", [1, 3]),
        ("These pass: [1, 3]", [1, 3]),
        ("[1] passes, [2] fails", None),
        ("Queries 1 and 2 pass.", None),
        ("", None),
    ],
)
def test_verdicts_of_the_judge(reply: str, numbers: list[int] | None) -> None:
    assert parse_numbers(reply) == numbers


def test_duplicates() -> None:
    year = (
        "In which year of the nineteenth century was the old lighthouse of the harbour at Stettin "
        "lit for the first time, {}?"
    )
    texts = [
        "When was it built?",
        "when was it  built",
        year.format("1871"),
        year.format("1872"),
        year.format("1871 ") + " please",
    ]
    assert filters.exact_duplicates(texts) == [None, "exact duplicate", None, None, None]
    assert filters.near_duplicates(texts) == [None, "near duplicate", None, None, "near duplicate"]


def test_round_trip_keeps_what_the_encoder_finds() -> None:
    rng = np.random.default_rng(0)
    documents = rng.standard_normal((50, 32)).astype(np.float32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    source = np.arange(20)
    similarity = documents[source] @ documents.T
    second = np.argsort(-similarity, axis=1)[:, 1]
    queries = documents[second]  # nearest to their neighbour, not to their source
    rank = (queries @ documents.T > np.sum(queries * documents[source], axis=1, keepdims=True)).sum(
        axis=1
    )
    for top_n in (1, 3, 10):
        found = filters.found_by_retriever(queries, documents, source, top_n)
        assert found.tolist() == (rank < top_n).tolist()
    assert filters.found_by_retriever(documents[source], documents, source, 1).all()


@pytest.mark.parametrize(("name", "most"), [(SMALL, 0), ("squad", 0.001), ("covidqa", 0.002)])
def test_good_questions_pass(name: str, most: float) -> None:
    """Every check at its worst: on good questions, each with the passage it was written for, so
    every drop is a mistake."""
    folder = folder_of(name)
    corpus, queries = texts(folder, "corpus"), texts(folder, "queries")
    asked = pairs(folder, "train")
    reasons = [
        (filters.check(queries[query], corpus[passage], "question"), queries[query])
        for query, passage in asked
    ]
    dropped = [(reason, query) for reason, query in reasons if reason]
    assert len(dropped) <= most * len(asked), dropped
