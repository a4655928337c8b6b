"""The page about scale prints what its own arithmetic gives, at rates that were measured."""

from __future__ import annotations

import csv
import json
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / ".github" / "docs" / "scale.rst").read_text(encoding="utf-8")
CODE = textwrap.dedent(PAGE.partition(".. code-block:: python\n")[2].partition("It prints")[0])


def test_the_figures_are_those_of_the_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(CODE, "scale.rst", "exec"), {})
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 6
    assert textwrap.indent(printed, "   ") in PAGE


def test_the_rates_of_mining_are_those_of_the_benchmark() -> None:
    """Of one core with AVX2, from the seconds of the committed rows; 768 dimensions stand for
    1,024."""
    given: dict[str, dict[int, float]] = {}
    exec(compile(CODE.partition("for n in")[0], "scale.rst", "exec"), given)
    seconds = {}
    results = ROOT / "benchmarks" / "results"
    with (results / "amd-epyc-zen-5-2-cores-avx512-bf16.csv").open() as file:
        for row in csv.DictReader(file):
            asked = row["op"], row["mode"], row["isa"], row["threads"], row["metric"]
            if asked == ("band_topk", "mine", "avx2", "1", "cpu_seconds"):
                shape = json.loads(row["shape"])
                if row["provider"] == "refine_fast" and shape["N"] == 200_000:
                    seconds[shape["D"]] = float(row["p50"])
    for d, measured in ((384, 384), (1024, 768)):
        rate = 2 * 4096 * 200_000 * measured / seconds[measured]
        assert given["MINING"][d] == pytest.approx(rate, rel=0.03)
