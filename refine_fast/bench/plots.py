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

STYLE = 5
"""Part of the digests; raise it when the drawing changes."""
THEMES = {
    "light": {"ink": "#24292f", "grid": "#d0d7de", "ours": "#0969da", "peers": "#8c959f"},
    "dark": {"ink": "#e6edf3", "grid": "#30363d", "ours": "#58a6ff", "peers": "#8b949e"},
}
MARKERS = "osD^v<>P*X"
PEER_COLORS = (
    "#d29922",
    "#3fb950",
    "#db61a2",
    "#a371f7",
    "#f78166",
    "#39c5cf",
    "#8b949e",
)
SCALED = {
    ("info_nce", "fwd+bwd"): "cpu_seconds",
    ("band_topk", "mine"): "cpu_seconds",
    ("fuse", "warm"): "seconds",
    ("encode", "MiniLM"): "cpu_seconds",
    ("train", "cached step"): "cpu_seconds",
}
"""What the scaling plots show, and the time that counts: a disk takes no CPU time."""
SIZES = {
    "B = N": "B = N",
    "B": "B",
    "N": "N",
    "D": "d",
    "gb": "GB of a model",
    "layers": "layers of the model",
}
"""The sizes that scaling is shown by, and their names."""
UNITS = {"cpu_seconds": "CPU seconds", "seconds": "seconds", "peak_mb": "MiB"}

Data = dict[str, Any]


def bars_data(places: list[list[Row]]) -> list[Data]:
    """For each line of README's table and machine: the peers' time over ours, within one run where
    the rows have that ratio."""
    found = []
    for line in LINES:
        for own in places:
            there = [row for row in own if matches(row, line) and row.metric == line.metric]
            times = {row.provider: row.p50 for row in there}
            if OURS not in times:
                continue
            speeds = {peer: time / times[OURS] for peer, time in times.items() if peer != OURS}
            speeds |= {
                row.peer: 1 / row.ratio_to_peer
                for row in there
                if row.provider == OURS and row.ratio_to_peer and row.peer in speeds
            }
            if speeds:
                shape = ", ".join(f"{name}={size:,}" for name, size in line.shape.items())
                title = f"{line.op}, {line.mode}, {line.dtype}\n{shape}\n{machine_name(there[0])}"
                ranked = sorted(speeds.items(), key=lambda item: item[1])
                found.append({"title": title, "speeds": ranked})
    return found


def scaling_data(places: list[list[Row]]) -> list[Data]:
    """For each machine, operation and size of which at least three values were measured while the
    others stayed: time and memory by it, ours and those of the peers. Where B and N are equal, they
    count as one. Of several such series the longest is shown."""
    found = []
    for own in places:
        series: dict[tuple[Any, ...], dict[str, dict[str, dict[float, float]]]] = {}
        for row in own:
            time = SCALED.get((row.op, row.mode))
            alone = row.threads == 1 or time == "seconds"
            if time is None or row.metric not in (time, "peak_mb") or not alone or row.p50 <= 0:
                continue
            sizes = dict(row.sizes)
            if row.op == "info_nce" and sizes.get("B") == sizes.get("N"):
                sizes["B = N"] = sizes.pop("B")
                del sizes["N"]
            for name in sizes.keys() & SIZES.keys():
                rest = tuple(sorted((k, v) for k, v in sizes.items() if k != name))
                place = machine_name(row)
                metrics = series.setdefault((row.op, name, row.dtype, rest, place, time), {})
                lines = metrics.setdefault(row.metric, {})
                lines.setdefault(row.provider, {})[sizes[name]] = row.p50
        longest: dict[tuple[str, str], Data] = {}
        for op, name, dtype, rest, place, time in sorted(series, key=str):
            drawn = {
                metric: {
                    provider: sorted(points.items())
                    for provider, points in sorted(lines.items())
                    if len(points) >= 3
                }
                for metric, lines in series[op, name, dtype, rest, place, time].items()
            }
            count = len(drawn.get(time, {}).get(OURS, ()))
            if count > longest.get((op, name), {"count": 0})["count"]:
                about = f"{dtype}, {', '.join(f'{k}={v:,}' for k, v in rest)}"
                longest[op, name] = {
                    "op": op, "size": name, "about": about, "place": place, "time": time,
                    "count": count, "lines": drawn,
                }  # fmt: skip
        order = [op for op, _ in SCALED], list(SIZES)
        found += sorted(
            longest.values(),
            key=lambda one: (order[0].index(one["op"]), order[1].index(one["size"])),
        )
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
                    points.append((row.op, row.provider, work["gflop"] / work["gb"], row.p50))
            best: dict[tuple[str, str], tuple[str, str, float, float]] = {}
            for point in points:
                if point[:2] not in best or point[3] > best[point[:2]][3]:
                    best[point[:2]] = point
            if best:
                found.append(
                    {
                        "title": f"{machine_name(one[0])}, {dtype}, one thread",
                        "matrix": roofs[dtype, "matrix"] * 1e3,
                        "copy": roofs[dtype, "copy"],
                        "points": sorted(best.values()),
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

    looks = looks_of(
        {name for one in data for lines in one["lines"].values() for name in lines}, colors
    )
    shown = [(one, metric) for one in data for metric in (one["time"], "peak_mb")]
    figure, axes = panels(len(shown), 2.7, 2.6, columns=4)
    for axis, (one, metric) in zip(axes, shown, strict=True):
        lines = one["lines"].get(metric, {})
        if not lines:
            axis.set_axis_off()
            continue
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), markersize=4, linewidth=1.2, **looks[name])
        axis.set(xscale="log", yscale="log")
        title = f"{one['op']}: {UNITS[metric]}\n{one['about']}\n{one['place']}"
        axis.set_title(title, color=colors["ink"], fontsize=7, loc="left")
        axis.set_xlabel(SIZES[one["size"]], color=colors["ink"], fontsize=7)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axis.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.minorticks_off()
        style(axis, colors)
        axis.grid(color=colors["grid"], linewidth=0.5)
    legend(figure, looks, colors)
    return figure


def draw_rooflines(data: list[Data], colors: dict[str, str]) -> Any:
    """FLOP rates by arithmetic intensity, below the roof."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    points = [point for one in data for point in one["points"]]
    looks = looks_of({name for _, name, _, _ in points}, colors)
    figure, axes = panels(len(data), 4.2, 3.6)
    for axis, one in zip(axes, data, strict=True):
        ridge = one["matrix"] / one["copy"]
        most = max([ridge * 4, *(point[2] * 2 for point in one["points"])])
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
        for op, name, intensity, rate in one["points"]:
            axis.plot(intensity, rate * 1e3, markersize=5, linestyle="", **looks[name])
            if name == OURS:
                axis.annotate(
                    f"{op}: {rate * 1e3:,.0f}", (intensity, rate * 1e3), fontsize=6,
                    xytext=(-5, 3), textcoords="offset points", ha="right", color=colors["ink"],
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
    legend(figure, looks, colors)
    return figure


def looks_of(providers: set[str], colors: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The marker and the color of each provider in all panels; ours comes first."""
    looks: dict[str, dict[str, Any]] = {OURS: {"marker": MARKERS[0], "color": colors["ours"]}}
    for i, name in enumerate(sorted(providers - {OURS})):
        marker = MARKERS[1 + i % (len(MARKERS) - 1)]
        looks[name] = {"marker": marker, "color": PEER_COLORS[i % len(PEER_COLORS)]}
    return looks


def legend(figure: Any, looks: dict[str, dict[str, Any]], colors: dict[str, str]) -> None:
    """One for all panels, below them."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=1.2, label=name, **look) for name, look in looks.items()]
    columns = 4 if figure.get_figwidth() > 6 else 2
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=7,
        labelcolor=colors["ink"],
    )  # fmt: skip


def panels(count: int, width: float, height: float, columns: int = 3) -> tuple[Any, list[Any]]:
    """A figure with so many axes, at most ``columns`` in a row."""
    from matplotlib.figure import Figure

    columns = min(count, columns)
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
