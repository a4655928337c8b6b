"""The benchmark suite: contenders agree, rows are keyed, reports are idempotent, a lost lead is
noticed. Nothing here depends on how long something takes."""

from __future__ import annotations

import json
import operator
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")

from refine_fast import cli
from refine_fast.bench import regression, rows, suite
from refine_fast.bench.compare import compare
from refine_fast.bench.flags import NAMES
from refine_fast.bench.measuring import Sample, peak_mb, percentiles, take_turns
from refine_fast.bench.operation import Contender, Operation, parse_shape
from refine_fast.bench.operations import OPERATIONS, operation
from refine_fast.bench.roofline import Rates
from refine_fast.bench.suite import OURS, Measured, Task, measure, ready, rows_of
from refine_fast.errors import RefineFastError

COMPARABLE = [
    (op, dtype)
    for modes in OPERATIONS.values()
    for op in modes
    if op.name != "run" and not op.mode.startswith("cold")
    for dtype in op.dtypes
    if dtype != "fp16" and (op.name, dtype) not in {("band_topk", "bf16"), ("train", "bf16")}
]
"""torch's scores in bf16 lie on the other side of an edge of the band than exact ones; train's bf16
takes long without hardware for it."""
TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2}
INFO_NCE, BAND = operation("info_nce", "fwd+bwd"), operation("band_topk", "mine")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors(found: Any) -> list[torch.Tensor]:
    return [x.float() for x in (found if isinstance(found, list | tuple) else [found])]


@pytest.mark.parametrize(
    ("op", "dtype"), COMPARABLE, ids=[f"{op.name}-{op.mode}-{dtype}" for op, dtype in COMPARABLE]
)
def test_contenders_compute_the_same_thing(op: Operation, dtype: str) -> None:
    """On the tiny inputs; those that answer another question say so and only run."""
    results = {}
    with op.inputs({**op.shape, **op.tiny}, dtype, "cpu") as inputs:
        for contender in op.contenders:
            if contender.missing("cpu", dtype) or contender.name == "torch.compile":
                continue  # minutes of a C++ compiler; it is the naive one's code
            if op.before is not None:
                op.before(inputs)
            found = contender.run(inputs)
            if contender.exact:
                results[contender.name] = tensors(op.result(found))
    ours = results.pop(OURS)
    assert all(torch.isfinite(x).all() and x.abs().max() > 0 for x in ours)
    assert results or op.mode == "drop_in"  # whose peers find fewer rows
    for name, theirs in results.items():
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).norm() <= TOLERANCE[dtype] * b.norm(), name


def test_the_flags_name_every_operation() -> None:
    assert tuple(OPERATIONS) == NAMES
    for name, modes in OPERATIONS.items():
        assert {op.name for op in modes} == {name}
        for op in modes:
            assert {op.peer, OURS} <= {one.name for one in op.contenders}
            assert all(set(sizes) <= set(op.shape) for sizes in (op.quick, op.tiny, *op.full))


def test_shape() -> None:
    allowed = {"B": 8, "gb": 0.5, "skip": 5}
    assert parse_shape("b=1_000, gb=2,skip=0", allowed) == {"B": 1000, "gb": 2.0, "skip": 0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("B", "--shape must be NAME=VALUE,... such as B=512,D=384 (got 'B')."),
        ("", "--shape must be NAME=VALUE,... such as B=512,D=384 (got '')."),
        ("X=1", "--shape: unknown size 'X'; this operation has B, gb, skip."),
        ("B=0", "--shape: B must be an integer > 0 (got '0')."),
        ("B=1.5", "--shape: B must be an integer > 0 (got '1.5')."),
        ("gb=nan", "--shape: gb must be a number > 0 (got 'nan')."),
        ("gb=inf", "--shape: gb must be a number > 0 (got 'inf')."),
        ("B=9223372036854775808", "--shape: B must be below 2**63 (got '9223372036854775808')."),
        ("skip=-1", "--shape: skip must be an integer >= 0 (got '-1')."),
    ],
)
def test_bad_shape_is_one_sentence(text: str, message: str) -> None:
    with pytest.raises(RefineFastError) as raised:
        parse_shape(text, {"B": 8, "gb": 0.5, "skip": 5})
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["infonce"], "unknown operation 'infonce'"),
        (["--shape", "B=3"], "need exactly one operation"),
        (["fuse", "--mode", "hot"], "fuse has the modes 'warm', 'lerp', 'cold'"),
        (["encode", "--dtype", "fp16"], "--dtype: encode (MiniLM) takes fp32, bf16"),
        (["info_nce", "--shape", "B=9,N=8"], "N must be at least B=9"),
        (["info_nce", "--threads", "0"], "--threads must be an integer >= 1 (got 0)"),
        (["info_nce", "--rounds", "0"], "--rounds must be an integer >= 1 (got 0)"),
        (["info_nce", "--isa", "sse"], "--isa must be one of scalar"),
        (["info_nce", "--only", "nobody", "--shape", "B=8,D=8"], "no contender 'nobody'"),
        (["info_nce", "--shape", "B=8,D=8", "--compare", "no.csv"], "no.csv: No such file"),
        (["info_nce", "--shape", ""], "--shape must be NAME=VALUE,... such as B=512,D=384"),
        (["info_nce", "--threads", "99999999999"], "--threads must be at most 1024"),
        (["--only", "liger"], "band_topk (mine) has no contender 'liger'"),  # info_nce has it
        (["info_nce", "--profile", "no/trace.json"], "the folder of no/trace.json does not exist"),
        (["info_nce", "--profile", "."], ". is a folder"),
        (["info_nce", "--profile", ""], ". is a folder"),
        (["info_nce", "--shape", "B=10000000000000,D=100000", "--profile"], "give smaller sizes"),
        (["info_nce", "--check"], "at its own shape, on one thread; leave out info_nce."),
        (["--check", "--shape", "B=8"], "on one thread; leave out --shape."),
        (["--check", "--threads", "0"], "on one thread; leave out --threads."),
        (["--report", "--quick"], "--report measures nothing; leave out --quick."),
        (["--report", "--isa", "avx2"], "--report measures nothing; leave out --isa."),
        (["info_nce", "--profile", "--only", "torch"], "contender once; leave out --only."),
    ],
)
def test_bad_flags_are_one_sentence(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(suite, "take_turns", None)  # nothing is measured before
    assert cli.main(["bench", *flags, "--out", str(tmp_path)]) == cli.BAD_INPUT
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_turns() -> None:
    """One uncounted round, then each contender first in turn, each call prepared."""
    calls: list[str] = []
    names = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = take_turns(names, rounds=3, before=lambda: calls.append("-"))
    assert "".join(calls).replace("-", "") == "abc" + "abc" + "bca" + "cab"
    assert calls.count("-") == 12
    assert {name: len(taken) for name, taken in samples.items()} == dict.fromkeys("abc", 3)
    calls.clear()
    take_turns(names, rounds=2, warm=False)
    assert "".join(calls) == "abc" + "bca"


def test_percentiles() -> None:
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert percentiles([float(x) for x in range(11)]) == (2.0, 5.0, 8.0)


def measured(cost: dict[str, float]) -> Measured:
    task = Task(INFO_NCE, {"B": 8, "N": 8, "D": 4}, "fp32", "cpu", rounds=3)
    samples = {name: [Sample(seconds, seconds)] * 3 for name, seconds in cost.items()}
    return Measured(task, samples, dict.fromkeys(cost, 5.0), Rates(1e9, 1e9), {})


def test_rows_hold_the_ratio_to_each_peer(tmp_path: Path) -> None:
    peer, other = INFO_NCE.peer, "naive cross_entropy"
    made = rows_of(measured({OURS: 2.0, peer: 4.0, other: 6.0}))
    ratios = {
        (row.provider, row.peer): row.ratio_to_peer for row in made if row.metric == "seconds"
    }
    third = pytest.approx(1 / 3)
    expected = {(OURS, peer): 0.5, (peer, peer): 1.0, (other, peer): 1.5, (OURS, other): third}
    assert ratios == expected
    (fraction,) = (
        row.p50 for row in made if (row.metric, row.provider) == ("fraction_of_roofline", OURS)
    )
    assert fraction == pytest.approx(6 * 8 * 8 * 4 / 1e9 / 2.0)
    assert {row.op for row in made} == {"info_nce", "roofline"}
    assert rows.load(rows.save(made, tmp_path)) == [
        replace(row, **{name: float(f"{getattr(row, name):.6g}") for name in ("p20", "p50", "p80")},
                ratio_to_peer=row.ratio_to_peer and float(f"{row.ratio_to_peer:.6g}"))
        for row in sorted(made, key=lambda row: rows.key(rows.as_text(row)))
    ]  # fmt: skip


def test_a_rerun_overwrites_its_rows(tmp_path: Path) -> None:
    peer = INFO_NCE.peer
    path = rows.save(rows_of(measured({OURS: 2.0, peer: 4.0})), tmp_path)
    count = len(rows.load(path))
    assert rows.save(rows_of(measured({OURS: 1.0, peer: 4.0})), tmp_path) == path
    after = rows.load(path)
    assert len(after) == count
    assert {row.p50 for row in after if (row.metric, row.provider) == ("seconds", OURS)} == {1.0}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"op,p20\ninfo_nce,1\n",
        lambda text: text[: text.rindex(b",")],
        lambda text: b"\xff\xfe" + text,
        lambda text: text + b"\xe9" * 50_000,
        lambda text: text + b'"' + b"x" * 200_000,
        lambda text: text.replace(b'""B""', b"B"),
    ],
    ids=["other columns", "cut", "UTF-16", "Latin-1", "no line", "shape"],
)
def test_a_file_that_is_no_table_is_refused(
    damage: Callable[[bytes], bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As an earlier file, and as that of this machine, before anything is measured."""
    path = rows.save(rows_of(measured({OURS: 2.0, INFO_NCE.peer: 4.0})), tmp_path)
    content = damage(path.read_bytes())
    path.write_bytes(content)
    monkeypatch.setattr(suite, "take_turns", None)
    flags = ["bench", "info_nce", "--shape", "B=8,D=8"]
    for more in (
        ["--compare", str(path), "--out", str(tmp_path / "new")],
        ["--out", str(tmp_path)],
    ):
        assert cli.main([*flags, *more]) == cli.BAD_INPUT
        printed = capsys.readouterr().err
        assert "is no table of benchmark rows" in printed
        assert len(printed) < 500
    assert path.read_bytes() == content
    rows.has_rows(path)  # raises nothing: a folder of results may hold other files


@pytest.mark.parametrize("name", ["file", "file/folder"])
def test_a_folder_that_cannot_be_made_is_refused_before_measuring(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(suite, "take_turns", None)
    flags = ["bench", "info_nce", "--shape", "B=8,D=8", "--out", str(tmp_path / name)]
    assert cli.main(flags) == cli.BAD_INPUT
    assert f"--out: rows cannot be kept in {tmp_path / name}" in capsys.readouterr().err


def test_compare_ignores_versions_and_takes_the_latest() -> None:
    peer = INFO_NCE.peer
    now = rows_of(measured({OURS: 3.0, peer: 4.0}))
    then = [
        replace(row, torch="1", commit="old", timestamp="2020")
        for row in rows_of(measured({OURS: 2.0, peer: 4.0}))
    ]
    older = [replace(row, p50=99.0, timestamp="2019") for row in then]
    changes = compare(now, then + older)
    (ours,) = (c for c in changes if (c.now.metric, c.now.provider) == ("seconds", OURS))
    assert ours.ratio == ours.of_lead == 1.5
    assert {change.now.metric for change in changes} == {"seconds", "cpu_seconds", "peak_mb"}


@pytest.mark.parametrize("op", ["info_nce", "band_topk"])
def test_the_command_measures_and_compares(
    op: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "peak_mb", lambda build: 3.0)  # else a process for each contender
    shape = {"info_nce": "B=64,D=16", "band_topk": "B=64,N=300,D=16,k=7"}[op]
    command = ["bench", op, "--shape", shape, "--quick", "--rounds", "1", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())  # a long name of a device wraps the line
    assert "roofline in fp32" in shown
    assert "refine_fast was" in shown
    (path,) = tmp_path.iterdir()
    metrics = {row.metric for row in rows.load(path) if row.provider == OURS}
    assert metrics == {"seconds", "cpu_seconds", "peak_mb", "tflops", "fraction_of_roofline"}
    assert cli.main([*command, "--compare", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in found["rows"]} == {op, "roofline"}


def measured_beside(peer: Callable[[Any], None], memory: bool = False) -> Measured:
    """Two rounds of ours and of one peer, on 9 queries."""
    op = replace(
        INFO_NCE,
        measures_memory=memory,
        contenders=(INFO_NCE.contender(OURS), Contender("broken", peer, "")),
    )
    return measure(Task(op, {"B": 9, "N": 9, "D": 8}, "fp32", "cpu", rounds=2))


def test_a_peer_that_fails_is_named() -> None:
    def fails(_: object) -> None:
        raise RuntimeError("no such kernel")

    found = measured_beside(fails)
    assert list(found.samples) == [OURS]
    assert found.absent == {"broken": "failed: RuntimeError: no such kernel"}


def test_a_peer_that_fails_at_the_full_size_is_named() -> None:
    """Such as for want of memory; the tiny inputs of the trial it takes."""

    def fails(inputs: Any) -> None:
        if len(inputs[0]) == 9:
            raise RuntimeError("out of memory\nframe #1: c10::Error")

    found = measured_beside(fails)
    assert list(found.samples) == [OURS]
    assert len(found.samples[OURS]) == 2
    assert found.absent == {"broken": "failed: RuntimeError: out of memory"}


def test_a_peer_whose_memory_cannot_be_measured_keeps_its_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dies = "broken"

    def peak(build: Any) -> float:
        if build.args[1] == dies:
            raise RuntimeError("the process that measured it died")
        return 3.0

    monkeypatch.setattr(suite, "peak_mb", peak)
    found = measured_beside(lambda inputs: None, memory=True)
    assert {name: len(taken) for name, taken in found.samples.items()} == {OURS: 2, "broken": 2}
    assert found.peaks == {OURS: 3.0}
    why = "memory not measured: RuntimeError: the process that measured it died"
    assert found.absent == {"broken": why}
    dies = OURS
    with pytest.raises(RuntimeError, match="the process that measured it died"):
        measured_beside(lambda inputs: None, memory=True)


def test_memory_is_what_one_call_adds() -> None:
    megabytes = 40
    assert 38 <= peak_mb(partial(partial, operator.mul, b"x", megabytes << 20)) <= 60


def test_memory_of_a_child_process() -> None:
    """One that does nothing starts as a copy of the process that measures, which does not count."""
    assert peak_mb(partial(partial, subprocess.run, ["true"])) < 8
    allocate = [sys.executable, "-c", "b'x' * (1 << 30)"]
    assert peak_mb(partial(partial, subprocess.run, allocate)) > 1000


def test_the_process_that_measures_memory_calls_the_contender() -> None:
    import refine_fast as rf

    what = (BAND.name, BAND.mode, {**BAND.shape, **BAND.tiny}, "fp32", "cpu")
    call = ready(what, OURS, rf.isa(), 1)
    assert torch.is_tensor(call())


# --- regression check


def costs(slowed: float, noise: float) -> regression.Costs:
    """Rounds of a contender whose lead is 2, divided by ``slowed``, on a machine whose speed drifts
    by half and whose single rounds scatter."""
    generator = torch.Generator().manual_seed(0)

    def round_() -> tuple[float, float]:
        drift = 1 + 0.5 * torch.rand((), generator=generator).item()
        a, b = (1 + noise * torch.randn(2, generator=generator)).tolist()
        return drift * slowed * a, 2 * drift * b

    return round_


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize(
    ("slowed", "passes"), [(1.0, True), (1.1, True), (1.3, False), (2.0, False)]
)
def test_a_lost_fifth_of_the_lead_fails(slowed: float, passes: bool, noise: float) -> None:
    limit = regression.KEPT * 2
    lead = regression.measure_lead(costs(slowed, noise), limit)
    verdict = regression.Verdict(INFO_NCE, lead, 2.0)
    assert verdict.passed is passes
    assert lead.low <= lead.median <= lead.high


def test_the_check_fails_on_a_slowed_contender(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, with clocks that are made up: ours takes 1 and then 1.3, the peer 2."""
    cost = {OURS: 1.0}

    def sample(run: Any) -> Sample:
        contender, _, calls = run.args
        mine = contender is INFO_NCE.contender(OURS).run
        seconds = calls * (cost[OURS] if mine else 2.0)
        return Sample(seconds, seconds)

    monkeypatch.setattr(regression, "sample", sample)
    monkeypatch.setattr(regression, "checked_operations", lambda: [INFO_NCE])
    command = ["bench", "--check", "--out", str(tmp_path)]
    assert cli.main(command) == 0  # nothing on record: nothing to compare with
    assert "no lead is recorded" in capsys.readouterr().err
    assert cli.main(["bench", "--record"]) == 2
    assert "--record says what --check does with the leads; add --check" in capsys.readouterr().err
    assert cli.main([*command, "--record"]) == 0
    (row,) = rows.load(next(tmp_path.iterdir()))
    assert (row.mode, row.provider, row.ratio_to_peer) == ("check fwd+bwd", OURS, 0.5)
    assert cli.main(command) == 0
    cost[OURS] = 1.3
    assert cli.main(command) == 1
    assert "lost a fifth of its lead" in capsys.readouterr().err


@pytest.mark.parametrize("other", [["--check"], ["--profile"], ["--report"]])
def test_flags_without_effect_are_refused(
    other: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "--compare", "earlier.csv", *other])
    assert f"argument {other[0]}: not allowed with argument --compare" in capsys.readouterr().err


def test_a_lead_is_that_of_the_same_level_and_device(tmp_path: Path) -> None:
    found = regression.lead_rows(regression.Verdict(INFO_NCE, regression.lead_of([2.0] * 9), None))
    here = replace(found[0], isa="avx2", device="here", ratio_to_peer=0.5)
    there = replace(here, device="there", ratio_to_peer=0.25)
    other = replace(here, isa="amx", ratio_to_peer=0.1)
    known = [here, there, other]
    assert regression.recorded_lead(known, INFO_NCE, "avx2", "here") == 2
    assert regression.recorded_lead(known, INFO_NCE, "avx2", "there") == 4
    assert regression.recorded_lead(known, INFO_NCE, "avx2", "elsewhere") is None
    assert regression.recorded_lead(known, INFO_NCE, "neon", "here") is None
    # of several versions the latest counts, whose row may come first
    new, old = (
        replace(here, timestamp=day, torch=version, ratio_to_peer=ratio)
        for day, version, ratio in (("2026", "2.13", 0.5), ("2025", "2.9", 0.9))
    )
    rows.save([new, old], tmp_path)
    known = regression.known_rows(tmp_path)
    assert regression.recorded_lead(known, INFO_NCE, "avx2", "here") == 2
