"""The command line: exit codes, errors as one sentence, progress on a terminal, notebooks."""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import signal
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console as RichConsole

import refine_fast as rf
from refine_fast import cli, termination
from refine_fast.pipeline import RunConfig, run
from refine_fast.pipeline.commands import doctor
from refine_fast.pipeline.console import Console

ROOT = Path(__file__).parent.parent


def perform(work) -> int:
    """The exit code of a command that does ``work``."""
    return cli.perform(
        argparse.Namespace(work=lambda *_: work(), quiet=False, json=False, stopped="stopped")
    )


def test_an_error_of_the_system_names_the_file_and_the_remedy(tmp_path: Path, capsys) -> None:
    assert perform(lambda: (tmp_path / "missing").read_text()) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'missing'}: No such file or directory; "
        "fix this and run the same command again.\n"
    )


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("train --out run", "run the same command to resume"),
        ("eval model --data set", "run the same command again"),
        ("plan --out run", "run the same command again"),
        ("index run", "run the same command again"),
    ],
)
def test_only_a_run_is_resumed(line: str, remedy: str) -> None:
    assert cli.parser().parse_args(line.split()).stopped == remedy


@pytest.mark.parametrize("number", ["0", "-1", "x"])
def test_a_prompt_is_tried_on_a_few_passages(number: str, capsys) -> None:
    """-1 is not all but one of them."""
    with pytest.raises(SystemExit):
        cli.parser().parse_args(["prompt", "--try", "p.jinja", "-n", number])
    assert "must be an integer from 1 to 1,000" in capsys.readouterr().err


def test_a_full_disk_is_an_error_of_the_system(capsys) -> None:
    def write() -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 10**6)

    assert perform(write) == 1
    assert "No space left on device; fix this and run the same" in capsys.readouterr().err


def test_sigterm_stops_a_command_as_ctrl_c_does(capsys) -> None:
    """By default it would leave temporary files. In another thread, which gets no signal, a command
    runs all the same; a handler of somebody else's stays."""
    with tempfile.TemporaryDirectory() as folder:

        def work() -> None:
            with tempfile.TemporaryDirectory(dir=folder):
                signal.raise_signal(signal.SIGTERM)

        assert perform(work) == 143
        assert os.listdir(folder) == []
    assert capsys.readouterr().err == "error: stopped; stopped.\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    def replaced() -> None:  # as Ray does while it waits
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    assert perform(replaced) == 143
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(perform, lambda: None).result() == 0
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        assert perform(lambda: signal.raise_signal(signal.SIGTERM)) == 0
        signal.signal(signal.SIGINT, termination._end_at_once)  # as while the command is imported
        assert perform(lambda: signal.raise_signal(signal.SIGINT)) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert heard == [signal.SIGTERM]


def test_ctrl_c_before_the_command_begins(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(cli, "add_run_flags", lambda _: signal.raise_signal(signal.SIGINT))
    assert cli.main(["run", "--out", "run"]) == 130
    assert capsys.readouterr().err == "error: stopped.\n"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_within_a_destructor_is_not_lost(capsys, sent: signal.Signals, code: int) -> None:
    """Python drops what is raised there: one SIGTERM in seven had no effect while libraries were
    imported."""

    class Last:
        def __del__(self) -> None:
            signal.raise_signal(sent)

    def work() -> None:
        Last()
        while True:
            time.sleep(0.01)

    assert perform(work) == code
    assert capsys.readouterr().err == "error: stopped; stopped.\n"


def test_what_an_operation_refuses_is_one_sentence(capsys) -> None:
    """Embeddings with NaN come from the user's encoder."""
    bad = np.full((4, 8), np.nan, np.float32)
    assert perform(lambda: rf.band_topk(bad, bad, 1)) == 2
    line, end = capsys.readouterr().err.split("\n")
    assert line.startswith("error: ")
    assert "NaN" in line
    assert line.endswith("; check the model, or use --precision fp32.")
    assert end == ""


def test_a_fault_of_ours_stays_a_traceback() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        perform(lambda: int("x"))


def test_bars_inside_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The query stage embeds chunks while it asks the model."""
    console = Console()
    screen = io.StringIO()
    console.err = RichConsole(file=screen, force_terminal=True, width=120)
    with console.progress("asking the model") as outer:
        outer(1, 2)
        with console.progress("embedding") as inner:
            inner(3, 4, note="fast")
        outer(2, 2)
    shown = screen.getvalue()
    assert "asking the model" in shown
    assert "embedding" in shown


def test_messages_are_shown_as_they_are(capsys) -> None:
    """The kinds of query and the extras look like rich's markup."""
    line = "llm:question: which [b]key[/b] does ':key:' name? [llm]"
    console = Console()
    for print_line in (console.say, console.warn, console.error):
        print_line(line)
    assert capsys.readouterr().err == f"{line}\nwarning: {line}\nerror: {line}\n"


def test_lines_where_there_is_no_terminal(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line a minute, whose estimate does not count what an earlier start did."""
    times = iter((0.0, 10.0, 59.0, 110.0, 111.0, 300.0))
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr("refine_fast.pipeline.console.time", clock)
    with Console().progress("training") as advance:
        for done in (1000, 1010, 1100, 1101, 3000):
            advance(done, 3000, note="loss 0.400")
    told = "  training: 1,100 of 3,000, about 0:31:40 left, loss 0.400\n"
    assert capsys.readouterr() == ("", told)


def test_a_quiet_console_says_nothing_of_progress(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refine_fast.pipeline.console.LINE_SECONDS", 0.0)
    for quiet in (False, True):
        with Console(quiet=quiet).progress("training") as advance:
            advance(1, 3)
            advance(2, 3)
        assert bool(capsys.readouterr().err) is not quiet


def test_a_run_inside_an_event_loop(tiny: Path, tmp_path: Path) -> None:
    """As in a notebook."""
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in sorted(topics)[:12]:
        (docs / f"{name}.md").write_text(topics[name][:300], encoding="utf-8")

    async def cell() -> None:
        config = RunConfig(docs=docs, out=tmp_path / "run", model=str(tiny))
        run(config, console=Console(quiet=True), until="query")

    asyncio.run(cell())
    assert (tmp_path / "run" / "queries.jsonl").exists()


def test_doctor_knows_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their packages and lowest versions as pyproject.toml has them."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    optional = declared["project"]["optional-dependencies"]
    assert set(doctor.extras()) == optional.keys() - {"test"}
    for extra in doctor.extras():
        assert sorted(map(str, doctor.packages_of(extra))) == sorted(packages_in(optional, extra))
    assert "pypdf" in {package.name for package in doctor.packages_of("documents")}  # by [pdf]


def packages_in(optional: dict[str, list[str]], extra: str) -> list[str]:
    """Those of an extra in pyproject.toml, and of the extras that it names."""
    packages = []
    for line in optional[extra]:
        requirement = doctor.Requirement(line.partition(";")[0])
        if requirement.name == "refine-fast":
            for name in requirement.extras:
                packages += packages_in(optional, name)
        else:
            packages.append(str(requirement))
    return packages


@pytest.mark.usefixtures("no_cluster")
def test_doctor_names_what_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"pypdf": "4.9", "openai": None}

    def version_of(name: str) -> str:
        if installed.get(name, "") is None:
            raise PackageNotFoundError(name)
        return installed.get(name) or version(name)

    monkeypatch.setattr(doctor, "version", version_of)

    def closed(name: str, trust_remote_code: bool) -> str:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(doctor, "_encoder", closed)
    rows = {what: (works, found) for what, works, found in doctor.check("minilm")}
    for extra, package in (("pdf", "pypdf"), ("llm", "openai")):
        [needed] = [str(r) for r in doctor.packages_of(extra) if r.name == package]
        assert needed.startswith(f"{package}>=")
        assert rows[f"extra {extra}"] == (
            False,
            f"pip install 'refine-fast[{extra}]' for {needed}",
        )
    assert rows["encoder"] == (False, "[Errno 13] Permission denied: 'minilm'")


def test_doctor_says_what_runs_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    memory = SimpleNamespace(total_memory=16 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    for missing in (None, "install x"):
        monkeypatch.setattr(doctor.band_topk_cuda, "missing_requirement", lambda _, x=missing: x)
        monkeypatch.setattr(doctor.triton_kernels, "missing_requirement", lambda x=missing: x)
        rows = {what: found for what, *found in islice(doctor.check("minilm"), 6)}
        assert rows["cuda"] == [True, "Tesla T4, 16 GiB"]
        by_torch = "runs its plain torch reference: install x"
        for name, instead in (("band_topk", "searches on the CPU: install x"),
                              ("info_nce", by_torch)):  # fmt: skip
            wanted = [True, "has its kernels"] if missing is None else [False, instead]
            assert rows[f"cuda {name}"] == wanted
