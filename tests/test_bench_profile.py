"""The profile of ``refine-fast bench --profile``: stages that add up, and a trace in Chrome's
format."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")

from refine_fast import cli, profiling
from refine_fast.bench import command
from refine_fast.bench.operations import OPERATIONS, operation
from refine_fast.bench.profile import profile, rows_of_threads
from refine_fast.bench.suite import OURS

INFO_NCE = operation("info_nce", "fwd+bwd")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


STAGES = {
    "info_nce": {"check", "pack", "scores", "softmax", "weights", "gradients", "finish"},
    "band_topk": {"pack", "multiply", "select", "rescore", "finish"},
    "fuse": {"plan", "read", "compute", "wait for write", "sync", "finish"},
}
SHAPES = {
    "info_nce": {"B": 1024, "N": 1024, "D": 256},
    "band_topk": {"B": 512, "N": 12_000, "D": 256, "k": 20, "skip": 5},
    "fuse": {"gb": 0.12, "shards": 1},
}


@pytest.mark.parametrize(
    ("name", "threads"), [*((name, 1) for name in STAGES), ("info_nce", 2), ("band_topk", 2)]
)
def test_stages_add_up_to_the_call(name: str, threads: int) -> None:
    """What is left is Python, autograd and allocation: 1 to 4% of a long call, and on a busy
    machine whatever the system does between two stages. So the bound only finds a large stage
    missing; the names find a small one."""
    torch.set_num_threads(threads)
    op = OPERATIONS[name][0]
    found = [profile(op, SHAPES[name], "fp32", "cpu", None) for _ in range(2)]
    best = max(found, key=lambda one: one.covered)
    # with two threads, chance decides which of them takes a short loop
    everyone = best.stages.caller.keys() | best.stages.others.keys()
    assert (best.stages.caller.keys() if threads == 1 else everyone) >= STAGES[name]
    assert 0.5 <= best.covered <= 1
    assert sum(own for _, own, _, _ in best.table()) == pytest.approx(best.seconds)
    assert best.stages.dropped == 0 or len(best.stages.events) == profiling.EVENTS
    if threads == 2:
        assert sum(best.stages.others.values()) > 0


def test_nothing_is_recorded_outside_of_a_recording() -> None:
    with (
        profiling.stage("plan"),
        INFO_NCE.inputs({"B": 8, "N": 8, "D": 8}, "fp32", "cpu") as leaves,
    ):
        INFO_NCE.contender(OURS).run(leaves)
    with profiling.recorded() as record:
        pass
    assert (record.caller, record.others, record.events) == ({}, {}, [])


def test_stages_nest_and_exclude_each_other() -> None:
    with profiling.recorded() as record, profiling.stage("plan"):
        with profiling.stage("read"):
            pass
        torch.randn(200, 200) @ torch.randn(200, 200)
    ended = [(name, thread) for name, thread, _, _ in record.events]
    assert ended == [("read", 0), ("plan", 0)]
    (_, _, begin, end), (_, _, outer_begin, outer_end) = record.events
    assert outer_begin <= begin <= end <= outer_end
    total = (outer_end - outer_begin) / 1e9
    assert math.isclose(sum(record.caller.values()), total, rel_tol=1e-6)
    refused = pytest.raises(ValueError, match="no stage is called")
    with profiling.recorded(), refused, profiling.stage("nonsense"):
        pass


METADATA = {
    "process_name": "name",
    "process_labels": "labels",
    "process_sort_index": "sort_index",
    "thread_name": "name",
    "thread_sort_index": "sort_index",
}
"""The metadata events of Chrome's trace event format, and the argument that each must have."""


def check_format(trace: dict[str, Any]) -> None:
    """Chrome's trace event format as Perfetto imports it: the fields of each phase, and complete
    events of one thread that nest. Perfetto drops one that overlaps another without nesting."""
    assert trace["displayTimeUnit"] in ("ms", "ns")
    by_thread: dict[tuple[object, object], list[tuple[float, float]]] = defaultdict(list)
    flows: dict[object, set[str]] = defaultdict(set)
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str), event
        assert isinstance(event["pid"], int | str), event
        assert isinstance(event["tid"], int | str), event
        assert isinstance(event.get("args", {}), dict), event
        phase = event["ph"]
        if phase == "M":
            assert METADATA[event["name"]] in event["args"]
            continue
        assert math.isfinite(event["ts"]), event
        assert event["ts"] >= 0, event
        if phase == "X":
            assert event["dur"] >= 0, event
            by_thread[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
        elif phase == "i":
            assert event.get("s", "t") in ("g", "p", "t")
        else:
            assert phase in ("s", "t", "f"), event
            flows[event["id"]].add(phase)
    assert all(phases >= {"s", "f"} for phases in flows.values())
    nanosecond = 1e-3
    for slices in by_thread.values():
        ends: list[float] = []
        for start, duration in sorted(slices, key=lambda one: (one[0], -one[1])):
            while ends and ends[-1] <= start + nanosecond:
                ends.pop()
            assert not ends or start + duration <= ends[-1] + nanosecond
            ends.append(start + duration)


def check_stages(trace: dict[str, Any], names: set[str]) -> None:
    """The stages lie within the slice of the call, in rows of their own."""
    events = trace["traceEvents"]
    (whole,) = (e for e in events if e["name"] == "refine_fast call" and e["ph"] == "X")
    own = [e for e in events if e.get("cat") == "refine_fast"]
    assert {e["name"] for e in own} >= names
    assert all(type(e["pid"]) is type(e["tid"]) is int for e in own)
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {rows[e["tid"]] for e in own} <= {"stages of the caller", "stages of other threads"}
    slack = 1e3  # microseconds between the two clocks
    for event in own:
        assert event["ts"] >= whole["ts"] - slack
        assert event["ts"] + event["dur"] <= whole["ts"] + whole["dur"] + slack


@pytest.mark.parametrize(
    ("name", "shape", "stages"),
    [
        ("info_nce", {"B": 300, "N": 300, "D": 64}, {"check", "pack", "scores", "gradients"}),
        ("fuse", {"gb": 0.004, "shards": 1}, {"plan", "read", "compute"}),
    ],
)
def test_trace_has_the_format_that_perfetto_reads(
    name: str, shape: dict[str, float], stages: set[str], tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    path = tmp_path / "trace.json"
    profile(OPERATIONS[name][0], shape, "fp32", "cpu", path)
    trace = json.loads(path.read_text())
    check_format(trace)
    check_stages(trace, stages)


def test_the_command_writes_a_trace_and_says_so(tmp_path: Path) -> None:
    """One line on the terminal: torch prints nothing of its own. In a new process, since torch's
    profiler reads its level once."""
    path = tmp_path / "trace.json"
    words = [sys.executable, "-m", "refine_fast", "bench", "band_topk", "--json"]
    words += ["--shape", "B=200,N=3000,d=64,k=7", "--profile", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (
        done.stderr == f"trace of band_topk (mine): {path} (open it at https://ui.perfetto.dev)\n"
    )
    (found,) = json.loads(done.stdout).values()
    assert found["trace"] == str(path)
    trace = json.loads(path.read_text())
    check_format(trace)
    check_stages(trace, {"pack", "multiply", "select"})
    assert any(e["name"].startswith("refine_fast::") for e in trace["traceEvents"])


def test_a_trace_that_lacks_stages_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the first ones."""
    monkeypatch.setattr(profiling, "EVENTS", 5)
    monkeypatch.setattr(command, "EVENTS", 5)
    path = tmp_path / "trace.json"
    flags = ["bench", "info_nce", "--shape", "B=64,d=16", "--profile", str(path)]
    assert cli.main(flags) == 0
    assert "it has the first 5 stages and lacks the last " in capsys.readouterr().err
    trace = json.loads(path.read_text())
    check_format(trace)
    assert len([e for e in trace["traceEvents"] if e.get("cat") == "refine_fast"]) == 5


def test_threads_that_do_not_overlap_share_a_row() -> None:
    events = [("write", 2, 0, 10), ("write", 1, 5, 7), ("read", 0, 1, 30), ("write", 1, 8, 20)]
    events += [("write", 3, 10, 12), ("write", 4, 21, 22)]
    found = rows_of_threads(profiling.Recording(events=events))
    assert found == {0: 0, 2: 1, 1: 2, 3: 1, 4: 1}
