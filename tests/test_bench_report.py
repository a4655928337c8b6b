"""What ``refine-fast bench --report`` writes: README's tables and the plots, from the rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("sentence_transformers", reason="needs the pipeline: pip install '.[pipeline]'")

from refine_fast.bench import plots, rows, tables
from refine_fast.bench.report import write_report
from refine_fast.bench.rows import Row
from refine_fast.bench.suite import OURS
from refine_fast.errors import RefineFastError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def test_readme_has_the_tables_of_the_results() -> None:
    readme = (ROOT / "README.md").read_text()
    assert tables.with_tables(readme, RESULTS) == readme, "run: refine-fast bench --report"


def test_plots_show_the_results() -> None:
    folder = RESULTS.parent / "plots"
    expected = {f"{name}-{theme}.svg": number for name, theme, _, number in plots.wanted(RESULTS)}
    assert {path.name: plots.drawn(path) for path in folder.iterdir()} == expected, (
        "run: refine-fast bench --report"
    )


def test_report_is_idempotent(tmp_path: Path) -> None:
    """A second one changes nothing; one from scratch writes the same bytes."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in RESULTS.glob("*.csv"):
        (results / path.name).write_bytes(path.read_bytes())
    readme = tmp_path / "README.md"
    marks = "".join(f"<!-- table: {name} -->\n<!-- end of table -->\n" for name in tables.TABLES)
    readme.write_text(f"before\n{marks}after\n")
    written = write_report(tmp_path, results)
    assert readme in written
    assert "before" in readme.read_text()
    first = {path: path.read_bytes() for path in written}
    assert write_report(tmp_path, results) == []
    for path in written:
        path.unlink()
    readme.write_text(f"before\n{marks}after\n")
    write_report(tmp_path, results)
    assert {path: path.read_bytes() for path in written} == first


def test_a_missing_marker_is_named(tmp_path: Path) -> None:
    with pytest.raises(RefineFastError, match="<!-- table: operations -->"):
        tables.with_tables("no markers", RESULTS)


def test_an_adapted_encoder_is_the_mean_over_the_seeds_of_one_machine() -> None:
    def recipe_row(device: str, seed: int, system: str, gain: str) -> dict[str, str]:
        return {
            "device": device,
            "seed": str(seed),
            "judged_on": "in_domain",
            "system": system,
            "passages": "100",
            "recall@3": f"0.{80 + seed}",
            "recall@3_gain": gain,
            "gain_low": gain,
            "gain_high": gain,
        }

    measured = [
        recipe_row("AMD EPYC, 2 cores", 0, "fused", "0.5"),
        *(recipe_row("Intel(R) Xeon(R) Processor, 2 cores", i, "fused", f"0.{i}") for i in (1, 3)),
        recipe_row("Intel(R) Xeon(R) Processor, 2 cores", 3, "BM25", ""),
    ]
    kept, where = tables.best_measured(measured)
    assert (kept, where) == (measured[1:], "Intel Xeon, 2 seeds")
    mean = tables.means(kept)["in_domain", "fused"]
    assert {name: round(mean[name], 9) for name in ("recall@3", "recall@3_gain", "gain_low")} == {
        "recall@3": 0.82,
        "recall@3_gain": 0.2,
        "gain_low": 0.2,
    }
    assert tables.best_measured(measured[:2])[1] == "AMD EPYC, 1 seed"


def row(op: str, mode: str, provider: str, metric: str, value: float, **shape: float) -> Row:
    """A row of float32 on one thread."""
    (made,) = rows.rows(
        {provider: [value]}, op=op, mode=mode, dtype="fp32", shape=shape, metric=metric, peer=""
    )
    return replace(made, threads=1, device="here, 2 cores", isa="avx2")


def test_bars_are_ratios_within_one_run() -> None:
    """A peer that was measured again beside ours, or alone, does not mix two runs."""
    line = tables.LINES[0]
    about = {"metric": line.metric, **line.shape}
    ours = row(line.op, line.mode, OURS, value=1.0, **about)
    peers = {"torch chunks of 256": (0.5, 9.0), "naive cross_entropy": (None, 3.0)}
    rows_ = [replace(ours, peer=name, ratio_to_peer=ratio) for name, (ratio, _) in peers.items()]
    rows_ += [
        row(line.op, line.mode, name, value=time, **about) for name, (_, time) in peers.items()
    ]
    (bars,) = plots.bars_data([rows_])
    assert bars["speeds"] == [("torch chunks of 256", 2.0), ("naive cross_entropy", 3.0)]


def test_of_several_versions_the_latest_is_shown(tmp_path: Path) -> None:
    line = tables.LINES[0]
    ours = row(line.op, line.mode, OURS, line.metric, 1.0, **line.shape)
    both = [
        replace(ours, peer="torch chunks of 256", ratio_to_peer=ratio, torch=torch, timestamp=day)
        for ratio, torch, day in ((0.5, "2.13", "2026"), (0.9, "2.9", "2025"))
    ]
    rows.save(both, tmp_path)
    (own,) = tables.machines(tmp_path)
    assert tables.speed(own, line) == "2.0x torch in chunks of 256 rows"


@pytest.fixture
def scaled() -> list[Row]:
    """Two operations: info_nce by B = N, at one of two widths; train by the model's layers."""
    found = []
    for metric in ("cpu_seconds", "peak_mb"):
        for B, value in ((8, 1.0), (16, 4.0), (32, 16.0)):
            for provider in (OURS, "torch chunks of 256"):
                found.append(row("info_nce", "fwd+bwd", provider, metric, value, B=B, N=B, D=4))
        found.append(row("info_nce", "fwd+bwd", OURS, metric, 9.0, B=8, N=8, D=2))
        found.append(row("info_nce", "fwd+bwd", "naive cross_entropy", metric, 5.0, B=8, N=8, D=4))
        for layers in (3, 6, 12):
            found.append(row("train", "cached step", OURS, metric, layers, B=4, layers=layers))
    return [*found, row("info_nce", "prefixes", OURS, "peak_mb", 1.0, B=8)]


def test_scaling_shows_each_size_that_was_varied(scaled: list[Row]) -> None:
    loss, train = plots.scaling_data([scaled])
    assert (loss["op"], loss["size"], loss["about"]) == ("info_nce", "B = N", "fp32, D=4")
    points = [(8, 1.0), (16, 4.0), (32, 16.0)]
    peers = {OURS: points, "torch chunks of 256": points}
    assert loss["lines"] == {"cpu_seconds": peers, "peak_mb": peers}
    assert (train["op"], train["size"], train["place"]) == ("train", "layers", "here, avx2")
    assert train["lines"]["cpu_seconds"] == {OURS: [(3, 3.0), (6, 6.0), (12, 12.0)]}


@pytest.mark.parametrize("theme", plots.THEMES)
def test_a_figure_has_one_legend(scaled: list[Row], theme: str) -> None:
    """Also where its panels show different providers; each has one look throughout."""
    figure = plots.draw_scaling(plots.scaling_data([scaled]), plots.THEMES[theme])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [OURS, "torch chunks of 256"]
    assert [axis.get_legend() for axis in figure.axes] == [None] * 4
    colors = {line.get_color() for axis in figure.axes for line in axis.lines[:1]}
    assert colors == {plots.THEMES[theme]["ours"]}


def test_the_results_show_scaling_in_every_size() -> None:
    """What README says of the plot: B, N, d and the size of a model."""
    found = plots.scaling_data(tables.machines(RESULTS))
    assert {one["size"] for one in found} >= {"B = N", "B", "N", "D", "layers"}
    assert {one["op"] for one in found} >= {"info_nce", "band_topk", "encode", "train"}
