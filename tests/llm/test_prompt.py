"""What is asked, about which chunks, and which settings are refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_fast.errors import RefineFastError
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm import LLMSettings, default_prompt
from refine_fast.pipeline.queries.llm.coverage import spread
from refine_fast.pipeline.queries.llm.generate import query_requests
from refine_fast.pipeline.queries.llm.prompt import KINDS, Template, wanted

HERE = "http://localhost:8000/v1"
GOOD = {"url": HERE, "models": ("m",), "mix": {"question": 0.6, "claim": 0.4}, "per_chunk": 4}


def test_the_default_prompt_keeps_its_prefix_and_carries_passage_title_and_wishes() -> None:
    wish = wanted({"question": 1.0, "claim": 1.0}, 6, "x")
    first = Template().render(passage="The quay.", title="Harbours", wanted=wish, total=6)
    second = Template().render(passage="The {{ crane }}.", title="", wanted=wish, total=6)
    assert first[0] == second[0]  # servers keep the state of a common prefix
    assert "language of the passage" in first[0]
    assert "Title: Harbours\nPassage: The quay.\nWanted: " in first[1]
    assert second[1].startswith("Passage: The {{ crane }}.\n")
    assert all(f"{w['count']} {w['kind']} (" in first[1] for w in wish)
    examples = [
        json.loads(line)
        for line in default_prompt().splitlines()
        if line.startswith('{"queries": [{"kind": "')
    ]
    assert len(examples) == 2
    for example in examples:
        assert all(q.keys() == {"kind", "text"} and q["kind"] in KINDS for q in example["queries"])


def test_the_mix_is_met_and_repeatable() -> None:
    mix = {"question": 0.6, "keywords": 0.4, "claim": 0.0}
    drawn: Counter[str] = Counter()
    for i in range(500):
        wish = wanted(mix, 4, str(i))
        assert sum(w["count"] for w in wish) == 4
        assert wish == wanted(mix, 4, str(i))
        drawn.update({w["kind"]: w["count"] for w in wish})
    assert drawn.keys() == {"question", "keywords"}
    assert drawn["question"] / 2000 == pytest.approx(0.6, abs=0.05)  # 4.5 standard deviations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% block user %}{{ passage }", "line 1"),
        (
            "{% block user %}{{ nobody }}{% endblock %}",
            "'nobody' is undefined; the variables are passage, title, total, wanted",
        ),
        ("no block", "no block 'user'"),
        ("{% block user %}{{ ''.__class__.__mro__[1].__subclasses__() }}{% endblock %}", "unsafe"),
    ],
)
def test_a_template_that_is_wrong(
    chunks: list[Chunk], tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(text)
    with pytest.raises(RefineFastError, match=message):
        next(query_requests(chunks, [0], LLMSettings(**GOOD, prompt=path)))


def test_a_template_may_leave_out_the_system_message(chunks: list[Chunk], tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% block user %}{{ passage }}{% endblock %}")
    (request,) = query_requests(chunks, [3], LLMSettings(**GOOD, prompt=path))
    assert request.messages == [{"role": "user", "content": chunks[3].text}]


def test_the_key_of_a_request_depends_on_all_that_decides_its_reply(chunks: list[Chunk]) -> None:
    def key(i: int = 0, **changes: Any) -> str:
        return next(query_requests(chunks, [i], LLMSettings(**{**GOOD, **changes}))).key

    changed = [
        {"models": ("n",)},
        {"temperature": 0.5},
        {"max_reply_tokens": 100},
        {"per_chunk": 2},
        {"mix": {"claim": 1.0}},
        {"extra": {"top_p": 0.9}},
    ]
    keys = [key(), key(1), *(key(**change) for change in changed)]
    assert len(set(keys)) == len(keys)
    assert key() == key(url="http://elsewhere/v1", concurrency=3, max_calls=5, key_env="OTHER")


@pytest.mark.parametrize("clustered", [False, True])
def test_every_prefix_of_the_order_is_spread(clustered: bool) -> None:
    """Ten topics of very unlike size, five documents each: a sample of ten meets every topic, one
    of fifty nearly every document."""
    rng = np.random.default_rng(0)
    topics = np.repeat(np.arange(10), [400, 200, 100, 50, 25, 20, 20, 20, 20, 20])
    chunks = [Chunk(str(i), str(i), "", f"{topic}-{i % 5}", 0, 1) for i, topic in enumerate(topics)]
    centres = np.eye(16, dtype=np.float32)[:10]
    embeddings = centres[topics] + 0.01 * rng.standard_normal((len(topics), 16)).astype(np.float32)
    order = spread(chunks, seed=0, embeddings=embeddings if clustered else None)
    assert sorted(order) == list(range(len(chunks)))
    assert order == spread(chunks, seed=0, embeddings=embeddings if clustered else None)
    assert len({chunks[i].source for i in order[:50]}) >= (25 if clustered else 50)
    if clustered:
        assert len({topics[i] for i in order[:30]}) == 10
    assert order != spread(chunks, seed=1, embeddings=embeddings if clustered else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"url": "localhost:8000"}, "llm must be a URL"),
        (
            {"url": "http://me:secret@host/v1"},
            "put the key in the environment variable OPENAI_API_KEY",
        ),
        ({"url": "http://host/v1?key=secret"}, "holds credentials or parameters"),
        ({"key_env": "sk-secret"}, "keep the key in the variable"),
        ({"models": ()}, "no model named"),
        ({"mix": {"question": 0.0}}, "shares must be >= 0"),
        ({"mix": {"question": -1.0, "claim": 2.0}}, "shares must be >= 0"),
        ({"per_chunk": 0}, r"per_chunk must be > 0 \(got 0\)"),
        ({"timeout": -1.0}, r"timeout must be > 0 \(got -1.0\)"),
        ({"max_cost": 5.0}, "needs prices"),
        ({"extra": {"max_tokens": 5}}, "llm_extra: the field 'max_tokens' is set by other options"),
        ({"url": "transformers", "extra": {"top_p": 1}}, "reads only 'chat_template_kwargs'"),
    ],
)
def test_settings_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RefineFastError, match=message) as caught:
        LLMSettings(**{**GOOD, **change})
    assert "secret" not in str(caught.value)
