"""``pytest benchmarks/``: what pytest-benchmark writes, compares and draws of the suite's
contenders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: pip install '.[bench]'")
pytest.importorskip("pygal", reason="needs pytest-benchmark[histogram]: pip install '.[bench]'")

ROOT = Path(__file__).parent.parent


def test_json_compare_and_histogram(tmp_path: Path) -> None:
    def benchmark(*flags: str) -> str:
        command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider"]
        command += ["-k", "info_nce and (refine_fast or chunks)", *flags]
        command += [f"--benchmark-storage={(tmp_path / 'store').as_uri()}"]
        sizes = {"REFINE_FAST_BENCH_SHAPE": "B=16,N=16,D=32", "COLUMNS": "200"}
        # nothing of this pytest's: in a worker of pytest-xdist, pytest-benchmark measures nothing
        others = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        done = subprocess.run(command, cwd=ROOT, env=others | sizes, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    benchmark("--benchmark-save=first", f"--benchmark-json={tmp_path / 'all.json'}")
    written = json.loads((tmp_path / "all.json").read_text())["benchmarks"]
    names = ["refine_fast", "torch_chunks_of_256"]
    assert [one["name"] for one in written] == [
        f"test_operation[info_nce-fwd+bwd-{name}]" for name in names
    ]
    assert {one["group"] for one in written} == {"info_nce fwd+bwd fp32 B=16 N=16 D=32"}
    assert all(one["extra_info"]["device"] in ("cpu", "cuda") for one in written)
    assert all(one["stats"]["rounds"] == 5 for one in written)
    said = benchmark("--benchmark-compare", f"--benchmark-histogram={tmp_path / 'plot'}")
    for name in names:
        assert f"{name}] (NOW)" in said
        assert f"{name}] (0001_first)" in said
    (plot,) = tmp_path.glob("plot*.svg")
    assert plot.name == "plot-info_nce_fwd+bwd_fp32_B=16_N=16_D=32.svg"
    assert plot.read_text().lstrip().startswith("<?xml")
