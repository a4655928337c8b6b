"""REFINE_FAST_ISA: which levels it accepts, and one sentence where it names none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import refine_fast


def run(code: str, isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "REFINE_FAST_ISA": isa},
    )


def sentence(isa: str) -> str:
    levels = ", ".join(refine_fast.available_isas())
    known = f"this machine has the levels {levels}"
    return f"REFINE_FAST_ISA is '{isa}'; {known}: set one of them, or unset it"


def missing_level() -> str:
    every = ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon")
    return next(level for level in every if level not in refine_fast.available_isas())


@pytest.mark.parametrize("isa", ["bogus", missing_level()])
def test_a_level_that_this_machine_lacks_is_one_sentence(isa: str) -> None:
    code = "import refine_fast.cli as cli; raise SystemExit(cli.main(['prompt']))"
    done = run(code, isa)
    assert (done.returncode, done.stderr, done.stdout) == (2, f"error: {sentence(isa)}\n", "")


@pytest.mark.parametrize("call", ["rf.info_nce(x, x)", "rf.band_topk(x, x, 1)", "rf.isa()"])
def test_every_first_use_raises_refine_fast_error(call: str) -> None:
    code = f"""
import torch, refine_fast as rf
from refine_fast.errors import RefineFastError
x = torch.eye(4)
for _ in range(2):  # the second call too
    try:
        {call}
    except RefineFastError as error:
        print(error)
"""
    done = run(code, "bogus")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [sentence("bogus")] * 2


def test_a_level_of_this_machine_is_taken() -> None:
    done = run("import refine_fast as rf; print(rf.isa())", "scalar")
    assert done.stdout == "scalar\n", done.stderr
