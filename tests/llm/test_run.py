"""``refine-fast`` with ``--llm``: the command line, a run folder, HTTP."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from refine_fast.cli import main

Endpoint = Any  # conftest's


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(12):
        text = f"Harbour {i} was built by the city of Port {i}. Its crane lifts {i} tonnes and its quay is {i}0 metres long."
        (folder / f"{i}.md").write_text(f"# Harbour {i}\n\n{text}\n")
    return folder


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_plan_queries_and_what_is_left(endpoint: Endpoint, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    common = [str(docs), "--out", str(out), "--llm", endpoint.url, "--llm-model", "tiny", "--price-in", "1", "--price-out", "2", "--json"]
    assert main(["plan", *common]) == 0
    plan = result(capsys)
    assert (plan["llm_calls"], endpoint.stats()["served"]) == (12, 0)
    assert plan["llm_cost"] == pytest.approx((plan["llm_tokens_in"] + 2 * plan["llm_tokens_out"]) / 1e6)
    assert main(["queries", *common, "--max-calls", "5"]) == 0
    assert endpoint.stats()["served"] == 5
    assert main(["queries", *common, "--max-calls", "50"]) == 0
    assert endpoint.stats()["served"] == 12
    account = json.loads((out / "llm.json").read_text())
    assert (account["replied"], account["reused"], account["stopped"]) == (12, 5, None)
    kinds = {json.loads(line)["kind"] for line in (out / "queries.jsonl").read_text().splitlines()}
    assert kinds == {"llm:question"}
    capsys.readouterr()
    assert main(["plan", *common]) == 0
    assert result(capsys)["llm_calls"] == 0
    assert main(["queries", *common, "--max-calls", "50"]) == 0
    assert "queries: up to date" in capsys.readouterr().err


def test_chunks_without_a_reply_are_asked_again_by_the_same_command(
    endpoint: Endpoint, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["queries", str(docs), "--out", str(out), "--llm", endpoint.url, "--llm-model", "tiny"]
    endpoint.set(empty=0.5)
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "chunks got no reply" in said
    failed = json.loads((out / "llm.json").read_text())["failed"]
    assert 0 < failed < 12
    endpoint.set(empty=0.0)
    assert main(command) == 0
    assert f"queries: {failed} chunks without a reply" in capsys.readouterr().err
    assert json.loads((out / "llm.json").read_text())["failed"] == 0
    assert main(command) == 0
    assert "queries: up to date" in capsys.readouterr().err


def test_prompt_is_printed_and_taken_back(endpoint: Endpoint, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prompt"]) == 0
    mine = tmp_path / "mine.jinja"
    mine.write_text(capsys.readouterr().out.replace("You write", "Thou writest"))
    command = ["queries", str(docs), "--out", str(tmp_path / "run"), "--llm", endpoint.url, "--llm-model", "tiny", "--prompt", str(mine)]
    assert main(command) == 0
    assert "Thou writest" in endpoint.stats()["bodies"][-1]["messages"][0]["content"]


def test_doctor_tells_of_the_endpoint(endpoint: Endpoint, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.set(structured="json_object", rejection=400, reply='{"queries": []}')
    assert main(["doctor", "--llm", endpoint.url, "--llm-model", "tiny", "--json"]) == 0
    row = result(capsys)["llm tiny"]
    assert row["works"]
    assert row["found"].startswith("served; json_schema rejected, json_object honoured, plain answers; 4,096 tokens of context; ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--llm", "localhost:8000", "--llm-model", "m"], "is no endpoint"),
        (["--llm", "http://localhost:1/v1"], "add --llm-model NAME"),
        (["--llm", "http://localhost:1/v1", "--llm-model", "m", "--llm-mix", "question"], "llm_mix: question is no mix"),
        (["--llm", "http://localhost:1/v1", "--llm-model", "m", "--judge", "perhaps"], "is neither yes nor no"),
        (["--llm", "http://localhost:1/v1", "--llm-model", "m", "--max-cost", "1"], "needs prices"),
        (["--llm", "http://localhost:1/v1", "--llm-model", "m", "--queries", "."], "leave out one of the two"),
    ],
)
def test_options_that_are_refused(docs: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["queries", str(docs), "--out", str(tmp_path / "run"), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif("REFINE_FAST_DATA" not in os.environ, reason="REFINE_FAST_DATA names no folder of real data")
def test_human_questions_over_http_are_those_of_the_file(endpoint: Endpoint, tmp_path: Path) -> None:
    """COVID-QA's train questions, once from its files with --queries and once from an endpoint that replays them: the same training
    queries, less those that a filter drops and counts."""
    covid = Path(os.environ["REFINE_FAST_DATA"]) / "covidqa"
    assert main(["queries", str(covid), "--out", str(tmp_path / "file"), "--queries", str(covid), "--quiet", "--limit", "500"]) == 0
    with gzip.open(covid / "queries.jsonl.gz", "rt") as file:
        questions = {row["_id"]: row["text"] for row in map(json.loads, file)}
    asked: dict[str, list[str]] = {}
    for line in (covid / "qrels" / "train.tsv").read_text().splitlines()[1:]:
        question, passage, _ = line.split("\t")
        asked.setdefault(passage, []).append(questions[question])
    chunks = [json.loads(line) for line in (tmp_path / "file" / "chunks.jsonl").read_text().splitlines()]
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({chunk["text"]: asked.get(chunk["id"], []) for chunk in chunks}))
    endpoint.set(answers=str(answers))
    most = str(max(map(len, asked.values())))
    command = ["queries", str(covid), "--out", str(tmp_path / "http"), "--quiet", "--limit", "500"]
    model = ["--llm", endpoint.url, "--llm-model", "tiny", "--llm-mix", "question=1", "--queries-per-chunk", most]
    assert main([*command, *model]) == 0

    def training(name: str) -> set[tuple[str, str]]:
        rows = [json.loads(line) for line in (tmp_path / name / "queries.jsonl").read_text().splitlines()]
        return {(" ".join(row["text"].split()), row["chunk_id"]) for row in rows}

    dropped = json.loads((tmp_path / "http" / "llm.json").read_text())["dropped"]
    assert training("http") <= training("file")
    assert len(training("file") - training("http")) <= sum(dropped.values()) <= 0.02 * len(training("file"))
