"""A language model as a teacher: its grades, their targets, the run with ``--teacher llm``."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import fork_script

from refine_fast.cli import main
from refine_fast.errors import RefineFastError
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.corpus.jsonl import read_records
from refine_fast.pipeline.queries.llm import Candidates, calls_to_grade, grade_passages
from refine_fast.pipeline.queries.llm.grade import grade_requests
from refine_fast.pipeline.queries.llm.reply_parser import parse_grades
from refine_fast.pipeline.stages.llm_teach import LOGITS_PER_GRADE
from refine_fast.pipeline.training.teachers import Judged, Teachers

Endpoint = Any  # conftest's


def candidates(count: int) -> list[Candidates]:
    """Queries with five passages each."""
    texts = [f"Harbour {i} was built by the city of Port {i}." for i in range(count + 5)]
    chunks = [Chunk(f"c{i}", text, "", "file", 0, len(text)) for i, text in enumerate(texts)]
    return [Candidates(f"who built harbour {i}", tuple(chunks[i : i + 5])) for i in range(count)]


def grade_of(chunk: Chunk) -> int:
    """As the server grades: by a hash."""
    return hashlib.md5(chunk.text.strip()[-12:].encode()).digest()[0] % 4


@pytest.mark.parametrize(
    ("reply", "grades"),
    [
        ("1: 3\n2: 0\n3: 2", {1: 3, 2: 0, 3: 2}),
        ("<think>1: 0, or 1: 2?</think>\n1: 3\n2: 0", {1: 3, 2: 0}),
        ("Here are the grades:\n- Passage 1: **3**\n- Passage 2: **1**", {1: 3, 2: 1}),
        ("[1] 3\n[2] 0", {1: 3, 2: 0}),
        ("1. 3\n2) 0\n3 - 1\n4 -> 2\n5：3", {1: 3, 2: 0, 3: 1, 4: 2, 5: 3}),
        ("| passage | grade |\n|---|---|\n| 1 | 3 |\n| 2 | 0 |", {1: 3, 2: 0}),
        ("1: 3 (the full answer, unlike 2: 1)\n2: 0", {1: 3, 2: 0}),
        ("1: grade 3\n2: relevance = 0/3", {1: 3, 2: 0}),
        ("1: 3, 2: 0; 3: 1", {1: 3, 2: 0, 3: 1}),
        ('```json\n{"1": 3, "2": 0}\n```', {1: 3, 2: 0}),
        ("1: 2\n2: 1\n1: 3", {1: 3, 2: 1}),
        ("1: 3, 2: 0\n3: 1, 4: 0", {1: 3, 2: 0, 3: 1, 4: 0}),
        ('[{"passage": 1, "grade": 3}, {"passage": 2, "grade": 0}]', {1: 3, 2: 0}),
        ('{"grades": [{"id": 1, "why": "it says so", "score": 2}]}', {1: 2}),
        ('{"passage_1": 3, "passage_2": 1}', {1: 3, 2: 1}),
        ("1: 7\n2: 2.5\n3: 30\n4: 1", {4: 1}),
        ("1-3: relevant", {}),
        ("All of them answer the 2 questions.", {}),
        ("<think>1: 3\n2: 0", {}),
        ("", {}),
    ],
)
def test_grades_in_a_reply(reply: str, grades: dict[int, int]) -> None:
    assert parse_grades(reply, 3) == grades


def test_the_grades_are_those_of_the_passages(endpoint: Endpoint, tmp_path: Path) -> None:
    """Whatever their order in the prompt, which says nothing of the order of the candidates and is
    the same again; no query is asked twice."""
    asked, store = candidates(12), tmp_path / "replies.jsonl"
    assert calls_to_grade(asked, endpoint.settings(), store).calls == 12
    for reused in (0, 12):
        grades, account = grade_passages(asked, endpoint.settings(), store)
        assert grades == [[grade_of(chunk) for chunk in each.passages] for each in asked]
        assert (account.graded, account.reused, account.ungraded) == (12, reused, 0)
    assert calls_to_grade(asked, endpoint.settings(), store).calls == 0
    stats = endpoint.stats()
    assert (stats["distinct"], stats["most"], account.calls) == (12, 1, 12)
    shown = [request.user for request in grade_requests(asked, endpoint.settings())]
    first = [f"Passage 1: {each.passages[0].text}" for each in asked]
    assert 0 < sum(head in text for head, text in zip(first, shown, strict=True)) < 12
    assert all("response_format" not in body for body in stats["bodies"])
    assert all(body["temperature"] == 0 for body in stats["bodies"])


def test_the_estimate_is_near_what_is_spent(endpoint: Endpoint, tmp_path: Path) -> None:
    asked = candidates(6)
    planned = calls_to_grade(asked, endpoint.settings(), tmp_path / "none.jsonl")
    requests = list(grade_requests(asked, endpoint.settings()))
    assert planned.tokens_in == sum(request.tokens_in for request in requests)
    assert planned.tokens_out_most == 6 * 512
    assert planned.tokens_out == 6 * 5 * 4


def test_replies_without_grades(endpoint: Endpoint, tmp_path: Path) -> None:
    """They count, and are not paid for again; the other queries have their grades."""
    endpoint.set(ungraded=0.4)
    asked, store = candidates(16), tmp_path / "replies.jsonl"
    grades, account = grade_passages(asked, endpoint.settings(concurrency=1), store)
    assert 0 < account.unusable < 16
    assert account.unusable == account.ungraded == grades.count(None)
    assert account.failed == 0
    endpoint.set(ungraded=0.0)
    assert grade_passages(asked, endpoint.settings(), store)[0] == grades
    assert endpoint.stats()["served"] == 16


def test_a_reply_that_leaves_a_passage_out_grades_nothing(
    endpoint: Endpoint, tmp_path: Path
) -> None:
    endpoint.set(reply="1: 3\n2: 0\n3: 1\n4: 0")
    with pytest.raises(RefineFastError, match=r"^teacher: http.* graded no query \(no reply gra"):
        grade_passages(candidates(3), endpoint.settings(), tmp_path / "replies.jsonl")


def test_a_model_that_never_grades_is_stopped(endpoint: Endpoint, tmp_path: Path) -> None:
    """Before all replies are paid."""
    endpoint.set(reply="I like all of them.")
    with pytest.raises(RefineFastError, match=r"^llm: stopped asking .*: 8 replies in a row are"):
        grade_passages(candidates(40), endpoint.settings(concurrency=1), tmp_path / "replies.jsonl")
    assert endpoint.stats()["served"] < 16


def test_a_limit_stops_it_and_a_higher_one_resumes(endpoint: Endpoint, tmp_path: Path) -> None:
    asked, store = candidates(12), tmp_path / "replies.jsonl"
    grades, account = grade_passages(asked, endpoint.settings(max_calls=5), store)
    assert (account.graded, account.stopped) == (5, "max_calls")
    assert grades.count(None) == 7
    grades, account = grade_passages(asked, endpoint.settings(max_calls=50), store)
    assert (account.graded, account.stopped, account.reused) == (12, None, 5)
    assert endpoint.stats()["served"] == 12
    another = [Candidates("another", asked[0].passages)]
    grades, account = grade_passages(another, endpoint.settings(max_calls=12), store)
    assert (grades, account.graded, account.stopped) == ([None], 0, "max_calls")


STAGE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from refine_fast.pipeline.queries.llm import LLMSettings, grade_passages
from test_grading import candidates
settings = LLMSettings(sys.argv[2], ("tiny",), {"question": 1}, 4, concurrency=1)
grade_passages(candidates(12), settings, Path(sys.argv[3]))
"""


def test_kill_9_repeats_only_the_query_in_flight(endpoint: Endpoint, tmp_path: Path) -> None:
    """Of the others, none is asked twice."""
    store = tmp_path / "replies.jsonl"
    endpoint.set(hold_after=5)
    here = str(Path(__file__).parent)
    process = fork_script(STAGE, here, endpoint.url, str(store))
    _wait(lambda: store.exists() and store.read_bytes().count(b"\n") == 5)
    process.kill()
    process.join()
    endpoint.set(hold_after=None)
    grades, account = grade_passages(candidates(12), endpoint.settings(), store)
    assert (account.graded, account.reused) == (12, 5)
    assert None not in grades
    stats = endpoint.stats()
    assert stats["distinct"] == 12
    assert stats["served"] <= 13


def _wait(condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_frozen_encoder_alone_teaches_a_query_without_grades() -> None:
    random = np.random.default_rng(0)
    q, d = (random.normal(size=(n, 4)).astype(np.float32) for n in (2, 3))
    judged = Judged([{0: 6.0, 2: 0.0}, {}], 2.0, "llm")
    teachers = Teachers(q, d, 0.5, None, judged)
    assert teachers.names == ["frozen", "llm"]
    targets = teachers.targets([0, 1], [0, 1, 2])
    expected = np.exp([3.0, -np.inf, 0.0])
    np.testing.assert_allclose(targets["llm"][0], expected / expected.sum(), rtol=1e-6)
    torch.testing.assert_close(targets["llm"][1], targets["frozen"][1], rtol=0, atol=0)


@pytest.fixture
def command(docs: Path, tiny: Path, endpoint: Endpoint, tmp_path: Path) -> list[str]:
    """A run over thirty pages; ``--queries`` of two for each of them."""
    lines = [
        {"text": f"{what} of {path.stem}", "doc_id": path.name}
        for path in sorted(docs.iterdir())
        for what in ("meaning", "rules")
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--out", str(tmp_path / "run"), "--model", str(tiny), "--llm", endpoint.url]
    flags += ["--llm-model", "tiny", "--teacher", "llm", "--queries", str(questions)]
    flags += ["--chunk-tokens", "64", "--band=-0.9,1", "--batch-size", "8", "--max-steps", "2"]
    flags += ["--ood", "none", "--served", "no", "--curve", "0,1", "--weight", "0.5"]
    return [str(docs), *flags, "--precision", "fp32"]


def test_a_run(command: list[str], endpoint: Endpoint, tmp_path: Path, capsys, monkeypatch) -> None:
    """The user's queries, graded by the model, which writes none: the negatives, the targets, the
    report, the card and the export; a rerun asks nothing; a stage declares what it reads."""
    from small_runs import undeclared_settings

    endpoint.set(ungraded=0.2)
    out = tmp_path / "run"
    assert main(["plan", *command, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["llm_calls"] == planned["training_queries"] > 20
    undeclared = undeclared_settings(monkeypatch)
    assert main(["run", *command]) == 0
    said = capsys.readouterr().err
    assert {"query", "teach", "train", "fuse", "report"} <= undeclared.keys()
    neither = {"llm_key_env", "llm_concurrency", "llm_timeout"}  # they decide no result
    neither |= {"prompt", "judge_prompt"}  # files, of requests for queries
    assert not any(names - neither for names in undeclared.values()), undeclared

    records = [json.loads(line) for line in (out / "taught.jsonl").open()]
    chunks = {chunk.id: chunk for chunk in read_records(out / "chunks.jsonl", Chunk)}
    facts = json.loads((out / "teaching.json").read_text())
    without = [record for record in records if "logit" not in record["positives"][0]]
    assert len(without) == facts["grading"]["unusable"] == facts["grading"]["ungraded"] > 0
    assert facts["grading"]["queries"] == len(records)
    assert facts["relabelled"] == sum(len(record["relabelled"]) for record in records) > 0
    for record in records:
        found = [*record["positives"], *record["negatives"], *record["relabelled"]]
        if record in without:
            assert all("logit" not in each for each in found)
            assert len(record["negatives"]) > 0
            continue
        grades = [grade_of(chunks[each["chunk_id"]]) * LOGITS_PER_GRADE for each in found]
        assert [each["logit"] for each in found] == grades
        lowest = min(each["logit"] for each in record["positives"])
        assert all(each["logit"] > lowest for each in record["relabelled"])
        assert all(each["logit"] <= lowest for each in record["negatives"])
    training = json.loads((out / "training.json").read_text())
    assert (training["teachers"], training["distill"]) == (["frozen", "llm"], 0.5)
    assert f"{facts['pairs']} pairs graded; {facts['relabelled']} of " in said
    assert f"  {len(without)} of {len(records)} replies do not grade each passage; the fr" in said

    loss = "0.5 InfoNCE + 0.5 distillation from the frozen encoder and the grades of tiny over"
    left_out = f"{facts['relabelled']} of {facts['negatives']} left out, which tiny scores above a"
    for name in ("report.md", "model/README.md"):
        text = (out / name).read_text()
        assert loss in text
        assert left_out in text
    graded = f"| grades | {len(records) - len(without)} of {len(records)} queries graded by tiny;"
    assert graded in (out / "report.md").read_text()
    card = (out / "model/README.md").read_text()
    assert f"; {len(without)} of {len(records)} queries without grades" in card
    report = json.loads((out / "report.json").read_text())
    assert report["mining"]["grading"] == facts["grading"]
    assert report["queries"]["account"] is None

    assert main(["export", str(out), "--format", "flagembedding", "--out", "-"]) == 0
    shown, said = capsys.readouterr()
    assert f"{len(without)} of {len(records)} queries are left out, since the teacher has" in said
    exported = {line["query"]: line for line in map(json.loads, shown.splitlines())}
    known = {record["query"]: record for record in records if record not in without}
    assert exported.keys() <= known.keys()
    for query, line in exported.items():
        assert line["neg_scores"] == [each["logit"] for each in known[query]["negatives"]]

    served = endpoint.stats()["served"]
    assert main(["run", *command]) == 0
    assert "teach: up to date" in capsys.readouterr().err
    assert main(["run", *command, "--teacher-temperature", "2"]) == 0
    assert "teach: up to date" in capsys.readouterr().err
    assert endpoint.stats()["served"] == served
    for changed, calls in (
        ([], 0),
        (["--max-calls", "1000"], 0),  # what is written stays as it is
        (["--skip", "0"], planned["llm_calls"]),
        (["--chunk-tokens", "48"], None),
    ):
        assert main(["plan", *command, *changed, "--json"]) == 0
        fresh = json.loads(capsys.readouterr().out)
        assert fresh["llm_calls"] == (fresh["training_queries"] if calls is None else calls)


def test_queries_without_a_reply_are_asked_again(
    command: list[str], endpoint: Endpoint, tmp_path: Path, capsys
) -> None:
    endpoint.set(empty=0.3)
    assert main(["train", *command]) == 0
    assert "queries got no grades (most often, " in " ".join(capsys.readouterr().err.split())
    facts = json.loads((tmp_path / "run" / "teaching.json").read_text())["grading"]
    assert facts["failed"] == facts["ungraded"] > 0
    endpoint.set(empty=0.0)
    assert main(["train", *command]) == 0
    assert f"teach: {facts['failed']} queries without a reply" in capsys.readouterr().err
    facts = json.loads((tmp_path / "run" / "teaching.json").read_text())["grading"]
    assert (facts["failed"], facts["graded"]) == (0, facts["queries"])


def test_a_model_that_writes_and_grades(
    command: list[str], endpoint: Endpoint, tmp_path: Path, capsys
) -> None:
    at = command.index("--queries")
    del command[at : at + 2]
    assert main(["queries", *command, "--quiet"]) == 0
    limit = endpoint.stats()["served"] + 10
    assert main(["train", *command, "--max-calls", str(limit), "--quiet"]) == 0
    facts = json.loads((tmp_path / "run" / "teaching.json").read_text())["grading"]
    account = json.loads((tmp_path / "run" / "llm.json").read_text())
    assert account["replied"] == account["chunks"]
    assert facts["stopped"] == "max_calls"  # of both stages together
    assert facts["calls"] == endpoint.stats()["served"] == limit
    assert facts["graded"] == 10 < facts["queries"]


def test_a_limit_that_leaves_nothing_to_the_teacher(
    command: list[str], endpoint: Endpoint, tmp_path: Path, capsys
) -> None:
    """The run goes on without it and says so; with a higher limit it grades."""
    at = command.index("--queries")
    del command[at : at + 2]
    assert main(["queries", *command, "--quiet"]) == 0
    served = str(endpoint.stats()["served"])
    assert main(["run", *command, "--max-calls", served]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "stopped by max_calls after 0 of " in said
    assert "the frozen encoder alone teaches the queries that a limit left out" in said
    assert json.loads((tmp_path / "run" / "teaching.json").read_text())["grading"]["graded"] == 0
    assert (tmp_path / "run" / "report.md").exists()
    assert main(["train", *command, "--max-calls", "1000", "--quiet"]) == 0
    facts = json.loads((tmp_path / "run" / "teaching.json").read_text())["grading"]
    assert facts["graded"] == facts["queries"] > 0


def test_a_model_that_grades_nothing_is_found_out_first(
    command: list[str], endpoint: Endpoint, tmp_path: Path, capsys
) -> None:
    endpoint.set(reply="I am sorry.")
    for first in ("plan", "train"):
        assert main([first, *command]) == 2
        message = capsys.readouterr().err
        assert f"error: llm: tiny at {endpoint.url} grades no passages: nothing usable" in message
    assert not (tmp_path / "run" / "chunks.jsonl").exists()


def test_what_cannot_be_combined(command: list[str], capsys) -> None:
    """In one sentence each."""
    at = command.index("--llm")
    assert main(["run", *command[:at], *command[at + 4 :]]) == 2
    needs = "error: teacher: llm is the language model of --llm; add --llm URL, or name a cross-enc"
    assert needs in capsys.readouterr().err
    at = command.index("--teacher")
    assert main(["run", *command[:at], *command[at + 2 :]]) == 2
    assert "llm: --queries already provides the queries; omit" in capsys.readouterr().err
    assert main(["run", *command, "--judge", "yes"]) == 2
    writes = "error: judge: is for queries that a language model writes, but --queries already prov"
    assert writes in capsys.readouterr().err


def test_a_folder_named_llm_is_no_teacher(tmp_path: Path, monkeypatch) -> None:
    from refine_fast.pipeline.config_file import load_config

    (tmp_path / "llm").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("teacher: llm\nllm: http://localhost:1/v1\nllm_model: a\n")
    config = load_config(tmp_path / "run.yaml", {"out": "run"})
    assert config.teacher == "llm"
    assert dataclasses.asdict(config.llm_settings())["url"] == "http://localhost:1/v1"
