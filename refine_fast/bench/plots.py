"""The plots of the results, as SVG, each for a light and a dark page: bars against peers, scaling,
rooflines.

A file holds a digest of what it shows: it is drawn again only if that changed, whatever the version
of matplotlib, and the test compares digests.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import atomic
from .rows import Row
from .suite import OURS
from .tables import LINES, machine_name, machines, matches

STYLE = 4
"""Part of the digests; raise it when the drawing changes."""
THEMES = {
    "light": {"ink": "#24292f", "grid": "#d0d7de", "ours": "#0969da", "peers": "#8c959f"},
    "dark": {"ink": "#e6edf3", "grid": "#30363d", "ours": "#58a6ff", "peers": "#8b949e"},
}
MARKERS = "osD^v<>P"
LINE_COLORS = (
    "#2f81f7",
    "#d29922",
    "#3fb950",
    "#db61a2",
    "#a371f7",
    "#f78166",
    "#39c5cf",
    "#8b949e",
)

Data = dict[str, Any]


def bars_data(places: list[list[Row]]) -> list[Data]:
    """For each line of README's table and machine: the peers' time over ours."""
    found = []
    for line in LINES:
        for own in places:
            there = [row for row in own if matches(row, line) and row.metric == line.metric]
            times = {row.provider: row.p50 for row in there}
            if OURS not in times:
                continue
            speeds = {peer: time / times[OURS] for peer, time in times.items() if peer != OURS}
            if speeds:
                shape = ", ".join(f"{name}={size:,}" for name, size in line.shape.items())
                title = f"{line.op}, {line.mode}, {line.dtype}\n{shape}\n{machine_name(there[0])}"
                ranked = sorted(speeds.items(), key=lambda item: item[1])
                found.append({"title": title, "speeds": ranked})
    return found


def scaling_data(places: list[list[Row]]) -> list[Data]:
    """For each operation and machine, each size of which at least three values were measured while
    the others stayed: times and memory by it. Where B and N are equal, they count as one."""
    found = []
    for own in places:
        measured = [
            row
            for row in own
            if row.provider == OURS
            and row.metric in ("cpu_seconds", "peak_mb")
            and row.threads == 1
            and row.op in ("info_nce", "band_topk", "fuse")
            and row.mode in ("fwd+bwd", "mine", "warm")
            and row.shape != "{}"
        ]
        series: dict[tuple[Any, ...], dict[float, float]] = {}
        for row in measured:
            sizes = dict(row.sizes)
            if row.op == "info_nce" and sizes.get("B") == sizes.get("N"):
                sizes["B = N"] = sizes.pop("B")
                del sizes["N"]
            for name in sizes.keys() & {"B", "N", "D", "gb", "B = N"}:
                rest = tuple(sorted((k, v) for k, v in sizes.items() if k != name))
                key = (row.op, row.mode, row.dtype, name, rest, row.metric, machine_name(row))
                series.setdefault(key, {})[sizes[name]] = row.p50
        for key in sorted(series, key=str):
            op, _, dtype, name, rest, metric, place = key
            if len(series[key]) >= 3:
                points = sorted(series[key].items())
                label = f"{op} {dtype}, {', '.join(f'{k}={v:,}' for k, v in rest)}, {place}"
                found.append({"size": name, "metric": metric, "label": label, "points": points})
    return found


def roofline_data(places: list[list[Row]]) -> list[Data]:
    """For each machine and dtype: the roof, and where ours and its peers lie below it."""
    found = []
    for own in places:
        one = [row for row in own if row.threads == 1]
        roofs = {
            (row.dtype, row.mode): row.p50
            for row in one
            if row.op == "roofline" and row.provider == "machine"
        }
        for dtype in sorted({dtype for dtype, _ in roofs}):
            about: dict[tuple[str, str, str], dict[str, float]] = {}
            for row in one:
                if row.provider == "least work" and row.dtype == dtype:
                    about.setdefault((row.op, row.mode, row.shape), {})[row.metric] = row.p50
            points = []
            for row in one:
                work = about.get((row.op, row.mode, row.shape), {})
                if row.metric == "tflops" and row.dtype == dtype and work.get("gb"):
                    what = f"{row.op}: {row.provider}"
                    points.append((what, work["gflop"] / work["gb"], row.p50, row.provider == OURS))
            best: dict[str, tuple[str, float, float, bool]] = {}
            for point in points:
                if point[0] not in best or point[2] > best[point[0]][2]:
                    best[point[0]] = point
            if best:
                found.append(
                    {
                        "title": f"{machine_name(one[0])}, {dtype}, one thread",
                        "matrix": roofs[dtype, "matrix"] * 1e3,
                        "copy": roofs[dtype, "copy"],
                        "points": sorted(best.values(), key=lambda point: -point[2]),
                    }
                )
    return found


def draw_bars(data: list[Data], colors: dict[str, str]) -> Any:
    """How many times as long the peers take."""
    figure, axes = panels(len(data), 3.6, 1.3 + 0.26 * max(len(one["speeds"]) for one in data))
    for axis, one in zip(axes, data, strict=False):
        names, values = zip((OURS, 1.0), *one["speeds"], strict=True)
        names = tuple("device (floor)" if name == "device" else name for name in names)
        axis.barh(names, values, color=[colors["ours"], *[colors["peers"]] * len(one["speeds"])])
        for i, value in enumerate(values):
            axis.text(value, i, f" {value:.2g}x", va="center", color=colors["ink"], fontsize=7)
        axis.set_title(one["title"], color=colors["ink"], fontsize=8, loc="left")
        axis.set_xlim(0, 1.25 * max(values))
        axis.set_xticks([])
        style(axis, colors)
    return figure


def draw_scaling(data: list[Data], colors: dict[str, str]) -> Any:
    """Times and memory, each by the size that changes, in logarithmic scales."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    pairs = sorted({(one["size"], one["metric"]) for one in data})
    figure, axes = panels(len(pairs), 3.4, 3.2)
    for axis, (size, metric) in zip(axes, pairs, strict=False):
        chosen = [one for one in data if (one["size"], one["metric"]) == (size, metric)]
        for i, one in enumerate(chosen):
            x, y = zip(*one["points"], strict=True)
            shown = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "linewidth": 1.2}
            axis.plot(x, y, color=LINE_COLORS[i % len(LINE_COLORS)], label=one["label"], **shown)
        axis.set_xscale("log")
        axis.set_yscale("log")
        unit = {"cpu_seconds": "CPU seconds", "peak_mb": "MiB"}[metric]
        axis.set_title(f"{unit} by {size}", color=colors["ink"], fontsize=8, loc="left")
        ticks = sorted({point[0] for one in chosen for point in one["points"]})
        axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks], rotation=45)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.minorticks_off()
        style(axis, colors)
        axis.grid(color=colors["grid"], linewidth=0.5)
        legend = axis.legend(
            fontsize=5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.25)
        )
        for text in legend.get_texts():
            text.set_color(colors["ink"])
    return figure


def draw_rooflines(data: list[Data], colors: dict[str, str]) -> Any:
    """FLOP rates by arithmetic intensity, below the roof."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, axes = panels(len(data), 4.2, 4.2)
    for axis, one in zip(axes, data, strict=False):
        ridge = one["matrix"] / one["copy"]
        most = max([ridge * 4, *(point[1] * 2 for point in one["points"])])
        x = [ridge / 8, ridge, most]
        axis.plot(
            x, [one["copy"] * x[0], one["matrix"], one["matrix"]], color=colors["ink"], linewidth=1
        )
        axis.text(
            x[0],
            one["matrix"],
            f"{one['matrix']:,.0f} GFLOP/s",
            fontsize=6,
            color=colors["ink"],
            va="bottom",
        )
        for i, (what, intensity, rate, ours) in enumerate(one["points"]):
            axis.plot(
                intensity, rate * 1e3, MARKERS[i % len(MARKERS)], markersize=5, linestyle="",
                color=colors["ours" if ours else "peers"], label=f"{what}: {rate * 1e3:,.0f}",
            )  # fmt: skip
        axis.set(xscale="log", yscale="log")
        for side, subs in ((axis.xaxis, (1,)), (axis.yaxis, (1, 2, 5))):
            side.set_major_locator(LogLocator(subs=subs))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.minorticks_off()
        axis.set_title(one["title"], color=colors["ink"], fontsize=8, loc="left")
        axis.set_xlabel("FLOP a byte", color=colors["ink"], fontsize=7)
        axis.set_ylabel("GFLOP/s", color=colors["ink"], fontsize=7)
        style(axis, colors)
        axis.grid(color=colors["grid"], linewidth=0.5)
        legend = axis.legend(
            fontsize=6, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18)
        )
        for text in legend.get_texts():
            text.set_color(colors["ink"])
    return figure


def panels(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with so many axes, at most three in a row."""
    from matplotlib.figure import Figure

    columns = min(count, 3)
    lines = -(-count // columns)
    figure = Figure(figsize=(columns * width, lines * height), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def style(axis: Any, colors: dict[str, str]) -> None:
    """Thin frames in the ink of the page."""
    axis.set_facecolor("none")
    axis.tick_params(colors=colors["ink"], labelsize=7)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(colors["grid"])


PLOTS = {
    "bars": (bars_data, draw_bars),
    "scaling": (scaling_data, draw_scaling),
    "roofline": (roofline_data, draw_rooflines),
}


def digest(data: list[Data]) -> str:
    """Of what a plot shows."""
    text = json.dumps([STYLE, data], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def wanted(results: Path) -> Iterator[tuple[str, str, list[Data], str]]:
    """(name, theme, data, digest) of every plot for which there are rows."""
    places = machines(results)
    for name, (collect, _) in PLOTS.items():
        data = collect(places)
        for theme in THEMES if data else ():
            yield name, theme, data, digest(data)


def drawn(path: Path) -> str:
    """The digest in a plot, or an empty string."""
    found = re.search(r"digest ([0-9a-f]{16})", path.read_text()) if path.exists() else None
    return found[1] if found else ""


def write_plots(results: Path, folder: Path) -> list[Path]:
    """Draws the plots whose data changed, and returns their files."""
    changed = []
    for name, theme, data, number in wanted(results):
        path = folder / f"{name}-{theme}.svg"
        if drawn(path) == number:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        save(PLOTS[name][1](data, THEMES[theme]), path, number)
        changed.append(path)
    return changed


def save(figure: Any, path: Path, number: str) -> None:
    """As SVG, the same bytes for the same data."""
    import matplotlib

    metadata = {"Date": None, "Description": f"digest {number}"}
    with matplotlib.rc_context({"svg.hashsalt": "refine_fast"}), atomic(path) as temporary:
        figure.savefig(temporary, format="svg", transparent=True, metadata=metadata)
