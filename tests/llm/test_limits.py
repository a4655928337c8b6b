"""A limit leaves the judge its part; ``plan`` knows which verdicts remain."""

import json
from pathlib import Path
from typing import Any

import pytest

from refine_fast.errors import RefineFastError
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.queries.llm import estimate, generate_queries
from refine_fast.pipeline.queries.llm.coverage import spread

Endpoint = Any  # conftest's

KINDS = ["old", "northern", "little", "wooden", "narrow", "inner", "public", "stone"]
NOUNS = ["quay", "crane", "bridge", "railway", "road", "lock", "wall", "basin"]


def test_the_judge_gets_its_part_of_a_limit_and_a_higher_one_resumes(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    store, some = tmp_path / "replies.jsonl", chunks[:20]
    limited = endpoint.settings(judge=True, max_calls=20)
    for _ in range(2):  # the repeated command spends no more
        _, account = generate_queries(some, limited, store)
        assert (account.replied, account.kept, account.unjudged) == (10, 10, 0)
        assert (account.stopped, account.calls) == ("max_calls", 20)
    _, account = generate_queries(some, endpoint.settings(judge=True, max_calls=40), store)
    assert (account.replied, account.unjudged, account.stopped) == (20, 0, None)
    assert account.calls == endpoint.stats()["served"] == 40


@pytest.mark.parametrize("limit", [{"max_tokens": 8_000}, {"max_cost": 0.008}])
def test_the_judge_gets_its_part_of_tokens_and_money(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, limit: dict[str, Any]
) -> None:
    settings = endpoint.settings(judge=True, price_in=1.0, price_out=1.0, **limit)
    _, account = generate_queries(chunks, settings, tmp_path / "replies.jsonl")
    assert (account.stopped, account.unjudged) == (*limit, 0)
    assert account.replied < len(chunks)
    # less than what two calls of the longest replies reserve is left
    assert 8_000 - 2 * (512 + 512) < account.tokens_in + account.tokens_out <= 8_000


@pytest.mark.parametrize("limit", ["max_tokens", "max_cost"])
def test_a_limit_above_what_everything_costs_leaves_nothing_out(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path, limit: str
) -> None:
    """A verdict costs less than the queries, mostly: its part is no half."""
    prices = {"price_in": 1.0, "price_out": 1.0}
    settings = endpoint.settings(judge=True, **prices)
    _, whole = generate_queries(chunks, settings, tmp_path / "whole.jsonl")
    most = {"max_tokens": whole.tokens_in + whole.tokens_out, "max_cost": whole.cost}[limit]
    limited = endpoint.settings(judge=True, **prices, **{limit: type(most)(1.2 * most)})
    store = tmp_path / "replies.jsonl"
    for _ in range(2):
        _, account = generate_queries(chunks, limited, store)
        assert (account.replied, account.unjudged, account.stopped) == (len(chunks), 0, None)
        assert (account.calls, account.kept) == (whole.calls, whole.kept)
        assert (account.candidates, account.dropped) == (whole.candidates, whole.dropped)
    assert estimate(chunks, limited, store).stops_after is None


def test_what_is_judged_stays_however_a_limit_cuts_the_rounds(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    """Every chunk's query is a near duplicate of another's, which is of a chunk far away in the
    order of asking."""
    order = spread(chunks, seed=0)
    answers = {}
    for turn, i in enumerate(order):
        of, end = turn % 60, "it" if turn < 60 else "it then"
        asked = f"In which year was the {KINDS[of % 8]} {NOUNS[of // 8]} of the harbour made longer"
        answers[chunks[i].text] = [f"{asked} for the first time, by whom, and who paid for {end}?"]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    endpoint.set(answers=str(tmp_path / "answers.json"))
    first = {chunks[i].id for i in order[:60]}
    kept = []
    for most in (180, 10_000):
        store, before = tmp_path / f"{most}.jsonl", endpoint.stats()["served"]
        judged = endpoint.settings(judge=True, max_calls=most)
        queries, account = generate_queries(chunks, judged, store)
        kept.append(queries)
        assert {query.chunk_id for query in queries} == first
        assert account.dropped == {"near duplicate": 60}
        # a call for every chunk, and one for every query that is kept
        assert endpoint.stats()["served"] - before == account.calls == 180
    assert kept[0] == kept[1] == sorted(kept[0], key=lambda each: int(each.chunk_id[1:]))


def test_what_a_share_of_a_limit_left_out_is_asked_later(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    """A request that the server refused for the moment, and whose next try the first share forbids,
    has not failed."""
    _, whole = generate_queries(chunks, endpoint.settings(judge=True), tmp_path / "whole.jsonl")
    most = int(1.2 * (whole.tokens_in + whole.tokens_out))
    endpoint.set(faults=0.3, kinds=["429"])
    settings = endpoint.settings(judge=True, max_tokens=most)
    _, account = generate_queries(chunks, settings, tmp_path / "replies.jsonl")
    assert (account.replied, account.failed, account.unjudged) == (len(chunks), 0, 0)


def test_what_fails_is_asked_once_however_often_a_limit_is_shared(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    first = chunks[spread(chunks, seed=0)[0]].text.partition(" was")[0]
    endpoint.set(flagged=f"{first} ", flag={"message": "your input was flagged"})
    limited = endpoint.settings(judge=True, max_tokens=16_000)
    _, account = generate_queries(chunks, limited, tmp_path / "replies.jsonl")
    assert (account.stopped, account.unjudged) == ("max_tokens", 0)
    assert (account.failed, account.rejected) == (1, 1)


def test_verdicts_that_are_owed_come_before_new_queries(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    store = tmp_path / "replies.jsonl"
    generate_queries(chunks[:10], endpoint.settings(), store)
    limited = endpoint.settings(judge=True, max_calls=10 + 10 + 6)
    _, account = generate_queries(chunks[:20], limited, store)
    assert (account.replied, account.unjudged) == (13, 0)


def test_a_limit_that_allows_no_call_names_the_remedy(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    store = tmp_path / "replies.jsonl"
    generate_queries(chunks[:1], endpoint.settings(models=("other",)), store)
    with pytest.raises(RefineFastError, match=r"\(stopped by max_calls\); raise the limit\.$"):
        generate_queries(chunks, endpoint.settings(max_calls=1), store)


def test_the_estimate_counts_the_verdicts_that_remain(
    endpoint: Endpoint, chunks: list[Chunk], tmp_path: Path
) -> None:
    store, some = tmp_path / "replies.jsonl", chunks[:12]
    judged = endpoint.settings(judge=True)
    whole = estimate(some, judged, store)
    assert (whole.calls, whole.verdicts) == (24, 12)
    generate_queries(some[:8], endpoint.settings(), store)
    rest = estimate(some, judged, store)
    assert (rest.calls, rest.verdicts) == (8 + 2 * 4, 8 + 4)
    assert estimate(some, endpoint.settings(), store).verdicts == 0
    half = estimate(some[:8], judged, store)
    _, account = generate_queries(some[:8], judged, store)
    assert half.calls == account.calls - 8 == 8
    assert half.tokens_in >= account.tokens_in - 8 * 100
    assert estimate(some[:8], judged, store).calls == 0
    assert estimate(some, judged, store).calls == 2 * 4
    other = tmp_path / "judge.jinja"
    other.write_text("{% block user %}Queries: {{ queries }} Passage: {{ passage }}{% endblock %}")
    anew = endpoint.settings(judge=True, judge_prompt=other)
    assert estimate(some[:8], anew, store).calls == 8


def test_chunks_of_one_text_are_one_call(endpoint: Endpoint, tmp_path: Path) -> None:
    texts = ["The quay is long. It was built by the city.", "The crane is old and lifts tonnes."]
    chunks = [Chunk(f"c{i}", texts[i % 2], "", "file", 0, 40) for i in range(6)]
    store = tmp_path / "replies.jsonl"
    assert estimate(chunks, endpoint.settings(), store).calls == 2
    assert generate_queries(chunks, endpoint.settings(), store)[1].calls == 2


def of_harbours(endpoint: Endpoint, tmp_path: Path) -> list[str]:
    """The arguments of a command about twelve documents."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for i in range(12):
        text = f"Harbour {i} was built by the city of Port {i}. Its crane lifts {i} tonnes."
        (docs / f"{i}.md").write_text(f"# Harbour {i}\n\n{text}\n")
    out = str(tmp_path / "run")
    return [str(docs), "--out", out, "--llm", endpoint.url, "--llm-model", "tiny"]


def test_plan_counts_the_verdicts_of_another_prompt(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from refine_fast.cli import main

    command = of_harbours(endpoint, tmp_path)
    assert main(["queries", *command, "--quiet"]) == 0
    capsys.readouterr()
    for judge, calls in (("no", 0), ("yes", 12)):
        assert main(["plan", *command, "--judge", judge, "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert planned["llm_calls"] == planned["llm_verdicts"] == calls
    assert main(["plan", *command, "--judge", "yes"]) == 0
    assert " at most 12, 12 of them of the judge " in capsys.readouterr().out


def test_plan_encodes_no_corpus_to_count_verdicts(
    endpoint: Endpoint,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from refine_fast.cli import main
    from refine_fast.pipeline.queries.llm import generate

    command = [*of_harbours(endpoint, tmp_path), "--judge", "yes", "--round-trip", "1"]
    assert main(["queries", *command, "--quiet"]) == 0
    monkeypatch.delattr(generate, "_round_trip")
    for prompt, calls in ((None, 0), ("Queries: {{ queries }} Passage: {{ passage }}", 12)):
        if prompt is not None:
            (tmp_path / "judge.jinja").write_text(f"{{% block user %}}{prompt}{{% endblock %}}")
            command += ["--judge-prompt", str(tmp_path / "judge.jinja")]
        capsys.readouterr()
        assert main(["plan", *command, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["llm_calls"] == calls
