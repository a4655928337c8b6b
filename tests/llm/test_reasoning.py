"""What a model thinks is no query, and a query about its marks is one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from refine_fast.errors import RefineFastError
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm import generate_queries, grade_passages
from refine_fast.pipeline.queries.llm.grade import Candidates
from refine_fast.pipeline.queries.llm.reply_parser import (
    parse_grades,
    parse_numbers,
    parse_queries,
    strip_reasoning,
)

Endpoint = Any  # conftest's

TAGS = [
    "What does the <think> tag do?",
    "How do I close it with </think> in a prompt?",
    "What is between <think> and </think>?",
    "What does `</think>` do?",
]
MARKS = ["What does <|im_end|> mean?", "How is [INST] used?", "What does <s>old</s> show?"]


@pytest.mark.parametrize(
    "form",
    [
        json.dumps,
        lambda texts: json.dumps({"queries": [{"kind": "question", "text": t} for t in texts]}),
        lambda texts: json.dumps(json.dumps(texts)),
    ],
    ids=["list", "schema", "in a string"],
)
def test_texts_about_the_marks_of_reasoning_in_json(form: Any) -> None:
    parsed = parse_queries(form([*TAGS, *MARKS]))
    assert [candidate.text for candidate in parsed.candidates] == [*TAGS, *MARKS]


@pytest.mark.parametrize("text", TAGS)
@pytest.mark.parametrize(
    "form",
    [
        "{}",
        "1. {}\n2. Who wrote it?",
        '```json\n["{}"]\n```',
        'Here they are:\n["{}"]',
        '<think>\nA tag?\n</think>\n["{}"]',
    ],
)
def test_texts_about_the_marks_of_reasoning_elsewhere(form: str, text: str) -> None:
    assert parse_queries(form.format(text)).candidates[0].text == text


@pytest.mark.parametrize(
    "reply",
    [
        "<think>Hm.</think>1. A?",
        "  <think>\nHm.\n</think>\n\n1. A?",
        "Hm.</think>1. A?",
        "Hm. </think>\n1. A?",
        "Hm.\n</think>\n\n1. A?",
        "<|start|>assistant<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>1. A?",
        "<think>Hm.</think>\n<reflection>So?</reflection>\n1. A?",
        "<think>Hm.</think><think>So?</think>\n1. A?",
        "Who? Hm. </think> 1. A?",
        "<|im_start|>assistant <think>Hm.</think>1. A?",
    ],
)
def test_reasoning_before_the_reply(reply: str) -> None:
    assert strip_reasoning(reply) == "1. A?"


ASKED = ["Who built the harbour?", "How long is the quay?"]


@pytest.mark.parametrize(
    "opening",
    [
        "",
        "\n\n",
        "<think>\n",
        "\n  <think>",
        "\ufeff<think>\n",
        "Sure!\n<think>\n",
        "Sure! <think>",
        "assistant\n<think>\n",
        "**<think>**\n",
        "<THINK>\n",
        "<think >\n",
        '<think type="deep">\n',
        "<thinking>\n",
        "<reasoning>\n",
        "<thought_process>\n",
        "<inner_monologue>\n",
        "<longcat_think>\n",
        "<|thinking|>\n",
        "<|START_THINKING|>",
        "[THINK]",
    ],
)
@pytest.mark.parametrize("before", ["", " ", "\n", "\n\n", "\n\n  ", "\r\n\t"])
def test_blanks_around_the_end_of_reasoning(opening: str, before: str) -> None:
    tag = re.search(r"[<\[]\W?(\w+)", opening)
    closing = f"</{tag[1]}>" if tag else "</think>"
    closing = {"</THINK>": "[/THINK]"}.get(closing, closing) if "[" in opening else closing
    if "<|" in opening:
        closing = "<|END_THINKING|>" if "START" in opening else "<|/thinking|>"
    thought = "Now, what would a sailor ask?\n\nWhich crane is it, the old one?"
    for after in ("", " ", "\n", "\n\n  ", "\r\n"):
        for reply in (
            "\n".join(ASKED),
            f"1. {ASKED[0]}\n2. {ASKED[1]}",
            f"<answer>\n{ASKED[0]}\n{ASKED[1]}\n</answer>",
            json.dumps({"queries": [{"kind": "question", "text": text} for text in ASKED]}),
        ):
            parsed = parse_queries(f"{opening}{thought}{before}{closing}{after}{reply}")
            assert [each.text for each in parsed.candidates] == ASKED, reply


@pytest.mark.parametrize(
    "reply",
    [
        "<think>Hm?</think>\nSo, what?\n\n  </think> A query\nB query",
        "What is asked?\n</think>\n\nSo what?\n</think>\nA query\nB query",
        "A query\n<think>What else?\n</think>\nB query",
        "A query <|end|>\n<|start|>assistant<|channel|>analysis<|message|>What else?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>B query",
        "Here are my reasoning steps:\nWhat is asked?\n[BEGIN FINAL RESPONSE]\nA query\nB query\n"
        "[END FINAL RESPONSE]",
        "Here is my thought process:\nWhat is asked?\nHere is my response:\nA query\nB query",
        "**Reasoning**\nWhat is asked?\n\n**Queries**\nA query\nB query",
        "Thought process: what is asked?\nWho asks?\nFinal answer:\nA query\nB query",
        '{"reasoning": ["What is asked?", "Who asks?"], "queries": ["A query", "B query"]}',
        '{"thought_process": {"1": "What is asked?"}, "queries": ["A query", "B query"]}',
        '[{"type": "thinking", "text": "What?"}, {"type": "text", "text": "A query"}, "B query"]',
        '{"queries": ["<think>What is asked?</think> A query", "Is it? Hm. </think>B query"]}',
    ],
)
def test_reasoning_in_several_parts_under_headings_and_in_json(reply: str) -> None:
    assert [each.text for each in parse_queries(reply).candidates] == ["A query", "B query"]


FOLDED = '<details type="reasoning" done="true">\n<summary>3 seconds</summary>\n'
THOUGHT = "<details>\n<summary>Thought for 3 seconds</summary>\n"


def test_reasoning_that_a_web_server_escaped_or_folded() -> None:
    asked = "> What is asked?\n> Who asks?\n"
    tags = (
        f"<think>\n{asked}</think>",
        f"{asked}</think>",
        f"Sure! <think type='deep'>{asked}</think>",
    )
    folded = f"{FOLDED}{asked}</details>", f"Sure!\n{THOUGHT}{asked}</details>"
    for reasoning in (*tags, *folded):
        for text in (reasoning, reasoning.replace("<", "&lt;").replace(">\n", "&gt;\n")):
            for reply in ("A query\nB query", '["A query", "B query"]'):
                parsed = parse_queries(f"{text}\n\n{reply}")
                assert [each.text for each in parsed.candidates] == ["A query", "B query"], text
    for text in (f"&lt;think&gt;{asked}", f"{THOUGHT}{asked}"):  # cut
        assert strip_reasoning(text) == ""
    escaped = [text.replace("<", "&lt;").replace(">", "&gt;") for text in TAGS]
    queries = [
        *escaped,
        "How is <details> opened? <details open> it is",
        "What does </details> end?",
    ]
    assert [each.text for each in parse_queries("\n".join(queries)).candidates] == queries
    explained = "1. A query\n<details><summary>Why</summary>It is one.</details>\n2. B query"
    assert [each.text for each in parse_queries(explained).candidates] == ["A query", "B query"]


@pytest.mark.parametrize("before", ["", "\n\n", "Sure!\n", "<think>Hm.</think>\n"])
@pytest.mark.parametrize("first", ["  - A query", "  - A query\n    - It is one."])
@pytest.mark.parametrize("second", ["  - B query", "- B query"])
def test_an_indented_list_after_reasoning(before: str, first: str, second: str) -> None:
    parsed = parse_queries(f"{before}{first}\n{second}")
    assert [each.text for each in parsed.candidates] == ["A query", "B query"]


def test_a_heading_of_thoughts_without_one_of_queries() -> None:
    parsed = parse_queries("Reasoning:\nWhat would a sailor ask?\nWhich crane is the old one?")
    assert (parsed.candidates, parsed.dropped) == ([], {"reasoning": 1})
    (parsed,) = parse_queries("reasoning under uncertainty\n").candidates
    assert parsed.text == "reasoning under uncertainty"


def test_blanks_without_end_take_no_time() -> None:
    """Quadratic, this would be minutes."""
    reply = "\n" * 100_000 + "Hm. " + " " * 100_000 + "> " * 100_000
    assert strip_reasoning(f"{reply}\n</think> A?") == "A?"


def test_drafts_within_reasoning_are_no_queries() -> None:
    draft = '{"queries": ["draft?"]} Hm. </think> ```json\n["A?"]\n```'
    assert [each.text for each in parse_queries(draft).candidates] == ["A?"]
    assert [each.text for each in parse_queries("- B? </think> - A?").candidates] == ["A?"]
    assert strip_reasoning("<|im_start|>assistant <think>\n1. Who built it?\n2. Whe") == ""


def test_verdicts_and_grades_after_reasoning() -> None:
    assert parse_numbers('Is it [1]? </think>{"answerable": [2]}') == [2]
    assert parse_grades("1: 0?\n</think>\n1: 3", 3) == {1: 3}


@pytest.mark.parametrize(
    "thought",
    [
        "Okay, let's see. The passage is about a lighthouse.\nWhen was it completed, and by whom?",
        "We need to generate two queries.\nWhat fuel did the old lamp use?",
        "The user wants me to write questions.\n1. When was the lighthouse completed?",
        "Alright, I need to come up with search queries.\nWho built it, and when?",
        "Hmm, the passage describes a lighthouse.\nThe lamp burnt rape oil until 1931.",
        "Here's a thinking process:\n\n1. **Analyze the Request:**\n2. Which lamp was it?",
        "**Thinking Process:**\n\n1. Identify the facts.",
        "First, I should find keywords. Lighthouse of the Oder.",
        "嗯，用户想要两个问题。\n灯塔是什么时候建成的？",
    ],
)
def test_thoughts_without_marks_are_no_queries(thought: str) -> None:
    parsed = parse_queries(thought)
    assert (parsed.candidates, parsed.how) == ([], "nothing")
    assert parsed.dropped == {"reasoning": 1}


@pytest.mark.parametrize(
    "text",
    [
        "I need a replacement for my lamp",
        "What do we need to renew a lighthouse's licence?",
        "The user has to confirm the password twice",
        "the passage of the Stamp Act",
        "Now I have no light, what should I do?",
        "I have to file a claim for my stolen bike",
        "I have to file a claim for my stolen bike.",
        "I need a json parser for python",
        "the text is blurry on my monitor",
        "The text is blurry on my monitor.",
        "the text says error 404 what does it mean",
        "I have to write queries in SQL, how?",
        "So I need a passage to India",
    ],
)
def test_what_only_begins_like_a_thought_is_a_query(text: str) -> None:
    assert [candidate.text for candidate in parse_queries(text).candidates] == [text]


def test_a_query_that_begins_like_a_thought_takes_no_other_along() -> None:
    parsed = parse_queries("Let me think about it lyrics\nlet it be lyrics")
    assert [candidate.text for candidate in parsed.candidates] == ["let it be lyrics"]


def test_a_preamble_is_no_thought() -> None:
    for preamble in (
        "Okay, here are 2 questions:",
        "I have written these queries:",
        "Let me help:",
    ):
        parsed = parse_queries(f"{preamble}\n1. Who built it?\n2. When was it lit?")
        assert len(parsed.candidates) == 2


PROSE = "The passage tells of a harbour.\nOne may ask: who built the harbour? Its crane is strong."


def test_a_server_that_sends_thoughts_alone(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    """In the field for them; queries in that field are a reply that the server takes for thoughts:
    ``test_the_form_that_the_model_accepts``."""
    endpoint.set(rules=["only reasoning"], reply=PROSE)
    with pytest.raises(RefineFastError, match=r"no chunk got a reply.*empty reply \(stop\)"):
        generate_queries(chunks[:3], endpoint.settings(), tmp_path / "replies.jsonl")


def test_grades_that_the_server_takes_for_thoughts(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    asked = [Candidates("who built it", tuple(chunks[:2]))]
    endpoint.set(rules=["only reasoning"], reply="1: 3\n2: 0")
    grades, _ = grade_passages(asked, endpoint.settings(), tmp_path / "a.jsonl")
    assert sorted(grades[0] or ()) == [0, 3]
    endpoint.set(reply="1: 3 at first sight.\nBut the second one, 2: 0?")
    with pytest.raises(RefineFastError, match=r"graded no query \(empty reply"):
        grade_passages(asked, endpoint.settings(), tmp_path / "b.jsonl")
