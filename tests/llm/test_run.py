"""``refine-fast`` with ``--llm``: the command line, a run folder, HTTP."""

import dataclasses
import itertools
import json
import os
import re
import signal
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from retrieval_sets import SMALL, folder_of, pairs, texts

from refine_fast.cli import main
from refine_fast.errors import RefineFastError
from refine_fast.pipeline.config import RunConfig
from refine_fast.pipeline.corpus.chunk import Chunk
from refine_fast.pipeline.encoder.encode import encode
from refine_fast.pipeline.queries.llm import LLMSettings, generate_queries
from refine_fast.pipeline.queries.llm.generate import query_requests
from refine_fast.pipeline.queries.llm.local_speed import SAMPLE, local_speed
from refine_fast.pipeline.stages import llm_query

Endpoint = Any  # conftest's


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for i in range(12):
        text = (
            f"Harbour {i} was built by the city of Port {i}. "
            f"Its crane lifts {i} tonnes and its quay is {i}0 metres long."
        )
        (folder / f"{i}.md").write_text(f"# Harbour {i}\n\n{text}\n")
    return folder


def result(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_plan_queries_and_what_is_left(
    endpoint: Endpoint, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    common = [
        str(docs),
        "--out",
        str(out),
        "--llm",
        endpoint.url,
        "--llm-model",
        "tiny",
        "--price-in",
        "1",
        "--price-out",
        "2",
        "--json",
    ]
    assert main(["plan", *common]) == 0
    plan = result(capsys)
    assert (plan["llm_calls"], endpoint.stats()["served"]) == (12, 1)
    assert plan["llm_cost"] == pytest.approx(
        (plan["llm_tokens_in"] + 2 * plan["llm_tokens_out"]) / 1e6
    )
    assert main(["queries", *common, "--max-calls", "5"]) == 0
    assert endpoint.stats()["served"] == 1 + 5  # the first request of a run is about no chunk
    assert main(["queries", *common, "--max-calls", "50"]) == 0
    assert endpoint.stats()["served"] == 1 + 1 + 12
    account = json.loads((out / "llm.json").read_text())
    assert (account["replied"], account["reused"], account["stopped"]) == (12, 4, None)
    kinds = {json.loads(line)["kind"] for line in (out / "queries.jsonl").read_text().splitlines()}
    assert kinds == {"llm:question"}
    capsys.readouterr()
    assert main(["plan", *common]) == 0
    assert result(capsys)["llm_calls"] == 0
    assert main(["queries", *common, "--max-calls", "50"]) == 0
    assert "query: up to date" in capsys.readouterr().err


def test_plan_counts_the_queries_that_are_made_besides_the_models(
    endpoint: Endpoint, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", str(docs), "--out", str(tmp_path / "run"), "--llm", endpoint.url]
    command += ["--llm-model", "tiny", "--json"]
    counts = []
    for kinds in ([], ["--query-kinds", "span"]):
        assert main([*command, *kinds]) == 0
        counts.append(result(capsys)["training_queries"])
    assert counts[1] > 1.5 * counts[0]


def test_plan_times_a_model_in_this_process(
    docs: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["plan", str(docs), "--out", str(out), "--llm", "transformers"]
    command += ["--llm-model", str(tiny_model), "--llm-reply-tokens", "16", "--json"]
    assert main(command) == 0
    plan = result(capsys)
    assert plan["llm_calls"] == 12
    assert plan["llm_tokens_per_second"] > 0
    assert plan["llm_minutes"] is not None
    assert not out.exists()  # the replies are not kept


def test_the_minutes_are_those_of_the_remaining_replies(
    tiny_model: Path, chunks: list[Chunk], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that counts its readings, the timed replies take one second."""
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=lambda: float(next(ticks)))
    monkeypatch.setattr("refine_fast.pipeline.queries.llm.local_speed.time", clock)
    settings = LLMSettings(
        "transformers", (str(tiny_model),), {"question": 1.0}, 2, max_reply_tokens=16
    )
    speed = local_speed(list(query_requests(chunks, list(range(len(chunks))), settings)))
    assert speed is not None
    assert speed.seconds_per_reply == 1 / SAMPLE
    assert 0 < speed.tokens_per_second <= 16 * SAMPLE
    assert local_speed([]) is None


def test_chunks_without_a_reply_are_asked_again_by_the_same_command(
    endpoint: Endpoint, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["queries", str(docs), "--out", str(out), "--llm", endpoint.url]
    command += ["--llm-model", "tiny"]
    endpoint.set(empty=0.5)
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "chunks got no reply" in said
    failed = json.loads((out / "llm.json").read_text())["failed"]
    assert 0 < failed < 12
    endpoint.set(empty=0.0)
    assert main(command) == 0
    assert f"query: {failed} requests without a reply" in capsys.readouterr().err
    assert json.loads((out / "llm.json").read_text())["failed"] == 0
    assert main(command) == 0
    assert "query: up to date" in capsys.readouterr().err


def test_what_the_server_rejects_for_good_leaves_the_stage_finished(
    endpoint: Endpoint, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.set(flagged="Harbour 3 ", flag={"message": "your input was flagged"})
    command = ["queries", str(docs), "--out", str(tmp_path / "run"), "--llm", endpoint.url]
    command += ["--llm-model", "tiny"]
    assert main(command) == 0
    assert "asked again they would fail again" in capsys.readouterr().err
    account = json.loads((tmp_path / "run" / "llm.json").read_text())
    assert (account["replied"], account["failed"], account["rejected"]) == (11, 1, 1)
    assert main(command) == 0
    assert "query: up to date" in capsys.readouterr().err


def test_a_start_that_failed_leaves_the_embeddings_to_the_next(
    endpoint: Endpoint, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = []

    def counted(model: Any, texts: list[str], **how: Any) -> Any:
        encoded.append(len(texts))
        return encode(model, texts, **how)

    def fail(*_: Any, **__: Any) -> None:
        raise RefineFastError("the server is gone")

    monkeypatch.setattr(llm_query, "encode", counted)
    command = ["queries", str(docs), "--out", str(tmp_path / "run"), "--llm", endpoint.url]
    command += ["--llm-model", "tiny", "--max-calls", "5"]
    with monkeypatch.context() as patched:
        patched.setattr(llm_query, "generate_queries", fail)
        assert main(command) == 2
    assert main(command) == 0
    assert encoded == [12]


def test_ctrl_c_says_what_is_kept(
    endpoint: Endpoint, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = tmp_path / "run" / "replies.jsonl"
    command = ["queries", str(docs), "--out", str(tmp_path / "run"), "--llm", endpoint.url]
    command += ["--llm-model", "tiny", "--llm-concurrency", "1"]

    def stop() -> None:
        # The trial's reply and those to three chunks.
        while not replies.exists() or replies.read_bytes().count(b"\n") < 4:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    endpoint.set(hold_after=4)
    threading.Thread(target=stop, daemon=True).start()
    assert main(command) == 130
    said = capsys.readouterr().err
    # The third reply may be on disk before it is counted.
    kept = r"[23] of 12 replies are on disk and will not be requested again\nerror: stopped; "
    assert re.search(kept, said), said
    endpoint.set(hold_after=None)
    assert main(command) == 0
    assert json.loads((tmp_path / "run" / "llm.json").read_text())["reused"] == 3


def test_a_prompt_is_tried_on_a_few_passages(
    endpoint: Endpoint, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prompt"]) == 0
    mine = tmp_path / "mine.jinja"
    mine.write_text(capsys.readouterr().out.replace("You write", "Thou writest"))
    command = ["prompt", "--try", str(mine), "-n", "3", "--docs", str(docs), "--json"]
    assert main([*command, "--llm", endpoint.url, "--llm-model", "tiny"]) == 0
    tried = json.loads(capsys.readouterr().out)
    assert len(tried["passages"]) == 3
    assert sum(len(passage["kept"]) for passage in tried["passages"]) == tried["kept"] > 0
    bodies = endpoint.stats()["bodies"]
    assert len(bodies) == 3
    assert all("Thou writest" in body["messages"][0]["content"] for body in bodies)
    table = tmp_path / "table.csv"
    table.write_text("note;said\nx;Le café est fermé.\ny;La mer est calme.\n", encoding="cp1252")
    command = ["prompt", "--try", str(mine), "--docs", str(table), "--json"]
    columns = ["--encoding", "cp1252", "--text-column", "said"]
    assert main([*command, *columns, "--llm", endpoint.url, "--llm-model", "tiny"]) == 0
    passages = json.loads(capsys.readouterr().out)["passages"]
    assert [passage["text"] for passage in passages] == ["Le café est fermé.", "La mer est calme."]


def test_prompt_is_printed_and_taken_back(
    endpoint: Endpoint, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = {}
    for name, said, changed in (
        ("queries", "You write", "Thou writest"),
        ("judge", "You check", "Thou checkest"),
    ):
        assert main(["prompt", name]) == 0
        mine[name] = tmp_path / f"{name}.jinja"
        mine[name].write_text(capsys.readouterr().out.replace(said, changed))
    command = [
        "queries",
        str(docs),
        "--out",
        str(tmp_path / "run"),
        "--llm",
        endpoint.url,
        "--llm-model",
        "tiny",
    ]
    command += [
        "--prompt",
        str(mine["queries"]),
        "--judge",
        "yes",
        "--judge-prompt",
        str(mine["judge"]),
    ]
    assert main(command) == 0
    asked = [body["messages"][0]["content"] for body in endpoint.stats()["bodies"]]
    assert "Thou checkest" in asked[-1]
    mine["judge"].write_text(mine["judge"].read_text().replace("Thou checkest", "Thou judgest"))
    assert main(command) == 0
    assert "judge prompt changed (judge.jinja)" in capsys.readouterr().err
    assert "Thou judgest" in endpoint.stats()["bodies"][-1]["messages"][0]["content"]
    # The first requests, for queries and for verdicts under each prompt of the judge; of twelve
    # chunks, the queries once and the verdicts twice.
    assert endpoint.stats()["calls"]["none"] == 1 + 2 + 36


@pytest.mark.usefixtures("no_cluster")
def test_doctor_tells_of_the_endpoint(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.set(structured="json_object", rejection=400, reply='{"queries": []}')
    assert main(["doctor", "--llm", endpoint.url, "--llm-model", "tiny", "--json"]) == 0
    row = result(capsys)["llm tiny"]
    assert row["works"]
    assert row["found"].startswith(
        "served; accepts json_object; json_schema rejected, json_object honoured, "
        "plain answers; 4,096 tokens of context; "
    )


@pytest.mark.usefixtures("no_cluster")
def test_doctor_asks_with_the_fields_of_the_run(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["doctor", "--llm", endpoint.url, "--llm-model", "tiny", "--llm-extra"]
    assert main([*command, '{"top_k": 3}']) == 0
    bodies = [body for body in endpoint.stats()["bodies"] if "messages" in body]
    assert bodies
    assert all(body["top_k"] == 3 for body in bodies)
    capsys.readouterr()
    assert main([*command, "3"]) == 2
    assert "llm_extra: 3 must be a JSON object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--llm", "localhost:8000", "--llm-model", "m"], "llm must be a URL"),
        (["--llm", "http://localhost:1/v1"], "add --llm-model NAME"),
        (
            ["--llm", "http://localhost:1/v1", "--llm-model", "m", "--llm-mix", "question"],
            "llm_mix: question must be kinds and shares",
        ),
        (
            ["--llm", "http://localhost:1/v1", "--llm-model", "m", "--judge", "perhaps"],
            "must be yes or no",
        ),
        (["--llm", "http://localhost:1/v1", "--llm-model", "m", "--max-cost", "1"], "needs prices"),
        (
            ["--llm", "http://localhost:1/v1", "--llm-model", "m", "--queries", "."],
            "omit --llm or --queries",
        ),
    ],
)
def test_options_that_are_refused(
    docs: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["queries", str(docs), "--out", str(tmp_path / "run"), *flags]) == 2
    assert message in capsys.readouterr().err


def asked_by_people(folder: Path) -> dict[str, list[str]]:
    """Passage -> the questions of a BEIR folder's train split."""
    questions = texts(folder, "queries")
    asked: dict[str, list[str]] = {}
    for question, passage in pairs(folder, "train"):
        asked.setdefault(passage, []).append(" ".join(questions[question].split()))
    return asked


@pytest.mark.parametrize("name", [SMALL, "squad", "covidqa"])
def test_what_people_asked_comes_through_http(
    endpoint: Endpoint, tmp_path: Path, name: str
) -> None:
    """The endpoint answers each chunk with the train questions on it: what arrives are those, less
    what was dropped with a reason."""
    folder = folder_of(name)
    asked = asked_by_people(folder)
    corpus = {passage: text.strip() for passage, text in texts(folder, "corpus").items()}
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({corpus[passage]: texts for passage, texts in asked.items()}))
    endpoint.set(answers=str(answers))
    chunks = [
        Chunk(passage, corpus[passage], "", name, 0, len(corpus[passage])) for passage in asked
    ]
    settings = endpoint.settings(mix={"question": 1}, per_chunk=max(map(len, asked.values())))
    queries, account = generate_queries(chunks, settings, tmp_path / "replies.jsonl")
    expected = {(passage, text) for passage, texts in asked.items() for text in texts}
    obtained = {(query.chunk_id, query.text) for query in queries}
    assert obtained <= expected
    assert account.kept + sum(account.dropped.values()) == sum(map(len, asked.values()))
    assert len(obtained) >= 0.985 * len(expected)


@pytest.mark.usefixtures("one_thread")
def test_the_same_queries_make_the_same_model_over_http_and_from_a_file(
    endpoint: Endpoint, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole pipeline, twice: with people's questions on 60 passages as --queries, and with an
    endpoint that answers with them."""
    folder = folder_of(SMALL)
    asked = asked_by_people(folder)
    corpus = list(texts(folder, "corpus").items())[:60]
    docs, questions, answers = (
        tmp_path / name for name in ("docs", "questions.jsonl", "answers.json")
    )
    docs.mkdir()
    (docs / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": key, "text": text}) + "\n" for key, text in corpus)
    )
    small = [
        "--model",
        str(tiny),
        "--precision",
        "fp32",
        "--batch-size",
        "8",
        "--curve",
        "0,1",
        "--weight",
        "0.35",
        "--ood",
        "none",
        "--band=-0.9,1",
    ]
    common = [str(docs), *small, "--json"]
    rows = [
        json.dumps({"text": text, "doc_id": key}) + "\n" for key, _ in corpus for text in asked[key]
    ]
    questions.write_text("".join(rows))
    assert main(["run", *common, "--out", str(tmp_path / "file"), "--queries", str(questions)]) == 0
    from_file = result(capsys)
    chunks = [
        json.loads(line) for line in (tmp_path / "file" / "chunks.jsonl").read_text().splitlines()
    ]
    answers.write_text(json.dumps({chunk["text"]: asked[chunk["id"]] for chunk in chunks}))
    endpoint.set(answers=str(answers), faults=0.2, kinds=["429", "500", "drop", "garbage"])
    model = [
        "--llm",
        endpoint.url,
        "--llm-model",
        "people",
        "--llm-mix",
        "question=1",
        "--queries-per-chunk",
        "50",
    ]
    assert main(["run", *common, "--out", str(tmp_path / "http"), *model]) == 0
    over_http = result(capsys)
    assert over_http["sets"] == from_file["sets"]
    same = "model/model.safetensors", "negatives.jsonl", "embeddings/queries.npy"
    for name in same:
        assert (tmp_path / "http" / name).read_bytes() == (tmp_path / "file" / name).read_bytes(), (
            name
        )
    report = (tmp_path / "http" / "report.md").read_text()
    assert "## What the language model wrote" in report
    assert f"{len(rows)} in the replies, {len(rows)} kept" in report


@pytest.mark.usefixtures("no_cluster")
def test_the_key_is_nowhere(
    endpoint: Endpoint,
    docs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither in a file of the run folder nor on the terminal, though the server echoes it in its
    refusal."""
    key = f"sk-{uuid.uuid4().hex}"
    monkeypatch.setenv("MY_KEY", f"{key}\n")  # as from a file; the line break is no part of it
    out = tmp_path / "run"
    command = ["queries", str(docs), "--out", str(out), "--llm", endpoint.url]
    command += ["--llm-key-env", "MY_KEY", "--llm-model"]
    assert main([*command, "tiny"]) == 0
    endpoint.set(status=401)
    assert main([*command, "another"]) == 2
    assert (
        main(["doctor", "--llm", endpoint.url, "--llm-key-env", "MY_KEY", "--llm-model", "tiny"])
        == 0
    )
    assert (
        main(
            [
                "queries",
                str(docs),
                "--out",
                str(out),
                "--llm",
                endpoint.url,
                "--llm-key-env",
                key,
                "--llm-model",
                "tiny",
            ]
        )
        == 2
    )
    monkeypatch.setenv("MY_KEY", f"{key} {key}")
    assert main([*command, "another"]) == 2
    said = capsys.readouterr()
    assert "HTTP 401: no: Bearer ***" in said.err
    assert "MY_KEY: the value holds blanks" in said.err
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert {"replies.jsonl", "config.yaml", "manifest.json", "queries.jsonl"} <= {
        path.name for path in written
    }
    assert key not in said.out + said.err
    assert not [path for path, data in written.items() if key.encode() in data]


def test_extra_fields_and_defaults(
    endpoint: Endpoint, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["queries", str(docs), "--out", str(tmp_path / "run"), "--llm", endpoint.url]
    command += ["--llm-model", "tiny"]
    assert main([*command, "--llm-extra", '{"reasoning_effort": "low"}']) == 0
    assert {body["reasoning_effort"] for body in endpoint.stats()["bodies"]} == {"low"}
    assert main(["queries", "--out", str(tmp_path / "run")]) == 0  # from its own config.yaml
    assert "query: up to date" in capsys.readouterr().err
    assert main([*command, "--llm-extra", "low"]) == 2
    assert "llm_extra: low must be a JSON object" in capsys.readouterr().err


def test_settings_and_config_have_the_same_defaults() -> None:
    settings = RunConfig(out="run", llm="http://localhost/v1", llm_model="m").llm_settings()
    assert settings is not None
    for field in dataclasses.fields(LLMSettings):
        if field.default is not dataclasses.MISSING:
            assert getattr(settings, field.name) == field.default, field.name
