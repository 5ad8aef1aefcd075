"""Pictures of docs/benchmarks.md from benchmarks/results/*.json: `python benchmarks/plots.py`, with matplotlib.

    docs/images/decode.svg     attention of one new token, ms by context, a panel for each shape of decode.json
    docs/images/tokens.svg     tokens/s of whole models by context, a panel for each file
    docs/images/kv-bytes.svg   bytes of their caches by context, the same

A file with one context is not drawn. The same files give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from compare import OURS, Row, milliseconds
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from tables import PAGE, Report, clock, reports, shape

IMAGES = PAGE.parent / "images"
STYLE: dict[str, Any] = {
    "svg.hashsalt": "inferos",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9,
    "legend.fontsize": 8,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
# Ours are thick and blue to green; the peers are thin, dashed, each with a marker of its own.
OUR_COLORS = {"f16": "#0b2e6f", "int8": "#1f6fd6", "k8v4": "#12a0a0", "int4": "#2ca02c"}
STOCK = "stock fp32"
PEER_LOOKS = {
    STOCK: ("#d62728", "s"),
    "ort": ("#e8871a", "D"),
    "torch": ("#9467bd", "^"),
    "openvino": ("#8c564b", "v"),
    "ggml": ("#555555", "x"),
}
NAMES = {"ort": "stock", "torch": "torch", "openvino": "OpenVINO", "ggml": "ggml"}


@dataclass(frozen=True)
class Series:
    """One line: an implementation with one format, over contexts in tokens."""

    impl: str
    kv: str
    points: tuple[tuple[int, float], ...]

    @property
    def label(self) -> str:
        return f"{NAMES.get(self.impl, self.impl)} {self.kv}"

    def draw(self, axes: Axes) -> None:
        contexts, values = zip(*self.points, strict=True)
        if self.impl == OURS:
            look: dict[str, Any] = {"color": OUR_COLORS[self.kv], "marker": "o", "linewidth": 2.2, "zorder": 3}
        else:
            color, marker = PEER_LOOKS[self.impl if self.label != STOCK else STOCK]
            look = {"color": color, "marker": marker, "linewidth": 1.2, "linestyle": "--"}
        axes.plot(contexts, values, label=self.label, markersize=5, **look)


@dataclass(frozen=True)
class Panel:
    title: str
    series: tuple[Series, ...]

    def contexts(self) -> list[int]:
        return sorted({context for line in self.series for context, _ in line.points})

    def spread(self) -> float:
        """The largest value over the smallest."""
        values = [value for line in self.series for _, value in line.points]
        return max(values) / min(values)


def series(rows: Iterable[Row], value: Callable[[Row], float | None]) -> list[Series]:
    """A line for each implementation and format."""
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if (measured := value(row)) is not None:
            points.setdefault((row["impl"], row["kv"]), []).append((row["context"], measured))
    return [Series(*who, tuple(sorted(found))) for who, found in points.items()]


def quickest(lines: list[Series]) -> list[Series]:
    """Ours, stock fp32, and of each peer the format with the least time at the longest context."""
    kept = [line for line in lines if line.impl == OURS or line.label == STOCK]
    for impl in dict.fromkeys(line.impl for line in lines if line.impl != OURS):
        best = min((line for line in lines if line.impl == impl), key=lambda line: line.points[-1][::-1])
        if best not in kept:
            kept.append(best)
    return kept


def by_shape(report: Report) -> list[Panel]:
    shapes = dict.fromkeys(shape(row) for row in report["rows"])
    found = {name: [row for row in report["rows"] if shape(row) == name] for name in shapes}
    return [
        Panel(f"{name} (heads / kv heads / head_dim)", tuple(quickest(series(rows, milliseconds))))
        for name, rows in found.items()
    ]


def by_model(found: dict[str, Report], value: Callable[[Row], float | None]) -> dict[str, Panel]:
    """A panel for each file with several contexts; rows that were decoded by themselves."""
    panels = {}
    for name, report in found.items():
        if report["bench"] == "e2e":
            lines = series((row for row in report["rows"] if row["batch"] == 1), value)
            panel = Panel(f"{report['settings']['model']} ({name})", tuple(lines))
            if len(panel.contexts()) > 1:
                panels[name] = panel
    return panels


def tokens(value: float, _: int = 0) -> str:
    """512, 4k, 1M: a context on the axis."""
    if value >= 1 << 20:
        return f"{value / (1 << 20):g}M"
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def plain(value: float, _: int = 0) -> str:
    return f"{value:,g}"


def draw(panel: Panel, axes: Axes, logarithmic: bool) -> None:
    axes.set_title(panel.title, fontsize=9)
    for line in panel.series:
        line.draw(axes)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(panel.contexts()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(tokens))
    if logarithmic or panel.spread() > 10:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(plain))
    else:
        axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def picture(panels: list[Panel], y_label: str, sources: str, *, logarithmic: bool) -> Figure:
    """All panels in one or two columns, the legends beside them, the source below."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * rows + 0.4), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        draw(panel, axes, logarithmic)
        axes.set_xlabel("context, tokens")
        axes.set_ylabel(y_label)
    figure.supxlabel(f"Source: {sources}", fontsize=7, color="#555555", x=0.01, ha="left")
    return figure


def save(name: str, figure: Figure) -> None:
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / name
    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    print(f"{path}: {path.stat().st_size:,} bytes")


def tokens_per_s(row: Row) -> float | None:
    found: float | None = row["tokens_per_s"]
    return found


def cache_megabytes(row: Row) -> float | None:
    return None if row["bytes"] is None else row["bytes"] / 1e6


def main() -> None:
    found = reports()
    mpl.rcParams.update(STYLE)
    if "decode.json" in found:
        report = found["decode.json"]
        figure = picture(by_shape(report), clock(report), "benchmarks/results/decode.json", logarithmic=True)
        save("decode.svg", figure)
    for name, label, value in (
        ("tokens.svg", "tokens/s", tokens_per_s),
        ("kv-bytes.svg", "KV cache, MB", cache_megabytes),
    ):
        models = by_model(found, value)
        if models:
            sources = "benchmarks/results/: " + ", ".join(models)
            save(name, picture(list(models.values()), label, sources, logarithmic=value is cache_megabytes))


if __name__ == "__main__":
    main()
