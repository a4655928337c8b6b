"""The first request of a run: sent before the documents are read, counted, and paid for once."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest

from refine_fast.cli import main


@pytest.fixture
def command(tmp_path: Path, tiny: Path, endpoint) -> list[str]:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in sorted(topics)[:12]:
        (docs / f"{name}.md").write_text(topics[name][:300], encoding="utf-8")
    flags = ["--out", str(tmp_path / "run"), "--model", str(tiny), "--quiet"]
    return [str(docs), *flags, "--llm", endpoint.url, "--llm-model", "small"]


@pytest.mark.parametrize("first", ["plan", "queries"])
def test_a_server_that_refuses_is_found_out_first(
    command: list[str], endpoint, tmp_path: Path, capsys, first: str
) -> None:
    endpoint.set(status=401)
    assert main([first, *command]) == 2
    assert "401" in capsys.readouterr().err
    assert not (tmp_path / "run" / "chunks.jsonl").exists()
    assert len(endpoint.stats()["bodies"]) == 1


@pytest.mark.parametrize("first", ["plan", "queries"])
def test_a_model_that_writes_no_query_is_found_out_first(
    command: list[str], endpoint, tmp_path: Path, capsys, first: str
) -> None:
    endpoint.set(reply="I am sorry.")
    assert main([first, *command]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: llm: small at {endpoint.url} writes no queries: nothing ")
    assert message.endswith(f"try refine-fast doctor --llm {endpoint.url} --llm-model small.\n")
    assert not (tmp_path / "run" / "chunks.jsonl").exists()
    assert endpoint.stats()["served"] == 3


@pytest.mark.parametrize("first", ["plan", "queries"])
def test_a_judge_without_verdicts_is_found_out_first(
    command: list[str], endpoint, tmp_path: Path, capsys, first: str
) -> None:
    """Of two writers, the first one judges."""
    endpoint.set(flagged="Queries:", flag={"message": "your input was flagged"})
    assert main([first, *command, "--llm-model", "one,two", "--judge", "yes"]) == 2
    message = capsys.readouterr().err
    assert f"one at {endpoint.url} gives no verdicts on queries: HTTP 403" in message
    assert not (tmp_path / "run" / "chunks.jsonl").exists()
    assert endpoint.stats()["served"] == 2


@pytest.mark.parametrize("first", ["plan", "queries"])
def test_a_model_in_this_process_that_is_not_there_is_found_out_first(
    command: list[str], endpoint, tmp_path: Path, capsys, first: str
) -> None:
    command = ["transformers" if part == endpoint.url else part for part in command]
    assert main([first, *command, "--llm-model", str(tmp_path)]) == 2
    assert f"llm_model: {tmp_path} cannot be loaded (" in capsys.readouterr().err
    assert not (tmp_path / "run" / "chunks.jsonl").exists()


def test_a_resumed_run_does_not_pay_for_it_again(command: list[str], endpoint) -> None:
    assert main(["plan", *command]) == 0
    assert endpoint.stats()["served"] == 1
    assert main(["queries", *command, "--max-calls", "3"]) == 0
    assert endpoint.stats()["served"] == 1 + 3  # the first one counts
    assert main(["queries", *command, "--max-calls", "5"]) == 0
    assert endpoint.stats()["served"] == 1 + 5


def test_a_server_that_is_not_there(command: list[str], endpoint, tmp_path: Path, capsys) -> None:
    command = ["http://127.0.0.1:9/v1" if part == endpoint.url else part for part in command]
    assert main(["queries", *command]) == 2
    assert "writes no queries: the connection failed" in capsys.readouterr().err
    assert not (tmp_path / "run" / "chunks.jsonl").exists()


def test_a_fault_by_chance_refuses_nothing(command: list[str], endpoint) -> None:
    endpoint.set(faults=0.3, kinds=["429", "500", "drop", "half"])
    assert main(["queries", *command]) == 0
