"""Figures from rows of numbers: lines, Pareto fronts, kernel benchmarks; for pages and for published results.

Knows rows (mappings) and the names of their fields; not runs, models or files.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from .drawing import INK, MARKERS, MUTED, PALETTE, PAPER, STYLE, new_figure, nice_log_axis, panel_title, place_labels, plain
from .json_values import real
from .pareto import pareto_front


@dataclass(frozen=True)
class Look:
    """Axes and frame of a figure: labels (else the names of the fields), scales, dashed horizontals by name, width in inches."""

    xlabel: str = ""
    ylabel: str = ""
    title: str = ""
    log_x: bool = False
    log_y: bool = False
    references: Mapping[str, float] = field(default_factory=dict)
    width: float = 6.4


LINEAR, LOG_Y = Look(), Look(log_y=True)


def lines_figure(
    rows: Iterable[Mapping[str, object]],
    x: str,
    y: str,
    series: str | None = None,
    *,
    panel: str | None = None,
    error: str | None = None,
    look: Look = LINEAR,
) -> Figure:
    """One line per value of `series`, one panel per value of `panel`; `error` half-widths.

    Rows in which x or y is missing or not finite are left out.
    """
    kept = [row for row in rows if _finite(row.get(x)) and _finite(row.get(y))]
    names = _distinct(kept, series)
    figure, panels = _panels(kept, panel, look)
    for axes, members in panels:
        for index, name in enumerate(names):
            line = sorted((row for row in members if series is None or row.get(series) == name), key=lambda row: real(row[x]))
            if not line:
                continue
            errors = [real(row.get(error) or 0.0) for row in line] if error else None
            axes.errorbar(
                [real(row[x]) for row in line],
                [real(row[y]) for row in line],
                yerr=errors,
                marker=MARKERS[index % len(MARKERS)],
                color=PALETTE[index % len(PALETTE)],
                label=None if series is None else str(name),
                capsize=2,
                markersize=4.5,
                linewidth=1.6,
            )
        _finish(axes, members, x, y, look)
    _legend(figure, [axes for axes, _ in panels], len(names) > 1)
    return figure


def pareto_figure(
    rows: Iterable[Mapping[str, object]],
    x: str = "total_bytes",
    y: str = "perplexity",
    label: str | None = "method",
    series: str | None = None,
    *,
    panel: str | None = None,
    look: Look = LOG_Y,
) -> Figure:
    """Points of two costs with the line through those that no other beats in both (smaller is better)."""
    kept = [row for row in rows if _finite(row.get(x)) and _finite(row.get(y))]
    names = _distinct(kept, series)
    figure, panels = _panels(kept, panel, look)
    for axes, members in panels:
        points = [(real(row[x]), real(row[y])) for row in members]
        front = [points[index] for index in pareto_front(points)]
        axes.plot(
            *zip(*front, strict=True), color=MUTED, linewidth=1.2, linestyle="-", drawstyle="steps-post", label="Pareto line", zorder=1
        )
        for index, name in enumerate(names):
            chosen = [point for point, row in zip(points, members, strict=True) if series is None or row.get(series) == name]
            axes.scatter(
                *(zip(*chosen, strict=True) if chosen else ((), ())),
                s=26,
                marker=MARKERS[(index + index // len(PALETTE)) % len(MARKERS)],
                color=PALETTE[index % len(PALETTE)],
                edgecolors=PAPER,
                linewidths=0.6,
                label=None if series is None else str(name),
                zorder=3,
            )
        _finish(axes, members, x, y, look)
        if label is not None:
            corners = [point for (x0, y0), (x1, y1) in pairwise(front) for point in _steps(x0, y0, x1, y1)]
            place_labels(axes, [(*point, str(row.get(label, ""))) for point, row in zip(points, members, strict=True)], avoid=corners)
    _legend(figure, [axes for axes, _ in panels], len(names) > 1)
    return figure


def _steps(x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
    """Points along the Pareto line from one member to the next: across, then down."""
    fractions = [step / 30 for step in range(31)]
    return [(x0 + (x1 - x0) * share, y0) for share in fractions] + [(x1, y0 + (y1 - y0) * share) for share in fractions]


def kernels_figure(rows: Iterable[Mapping[str, object]], *, rank: int = 32, against: str = "torch bfloat16", title: str = "") -> Figure:
    """How many times faster than `against` each variant of a matmul is, by rows of x; one panel per matrix.

    rows: as the kernel benchmark writes them (`operator, model, out, inputs, rows, rank, variant, microseconds`); rows that
    belong to no single matrix are left out. Shown are the variants without a low-rank term and those that exist only
    with one, at the measured rank nearest to `rank`; `against` is the fastest such row at the same matrix and number of rows, and the dashed line at 1.
    """
    kept = [row for row in rows if row.get("out") and row.get("operator") != "quantize" and _finite(row.get("microseconds"))]
    base: dict[tuple[object, ...], float] = {}
    for row in kept:
        if row["variant"] == against:
            base[_matrix(row)] = min(base.get(_matrix(row), math.inf), real(row["microseconds"]))
    ranks = {real(row["rank"]) for row in kept if row["rank"]}
    shown = (0, min(ranks, key=lambda measured: abs(measured - rank), default=0))
    plain_variants = {row["variant"] for row in kept if not row["rank"]}
    relative = [
        {
            "rows": row["rows"],
            "matrix": f"{row['model']}: {row['out']:,} × {row['inputs']:,}",
            "speed": base[_matrix(row)] / real(row["microseconds"]),
            "variant": f"{row['operator']} {row['variant']}" + (f", rank {row['rank']}" if row["rank"] else ""),
        }
        for row in kept
        if row["variant"] != against
        and row["rank"] in shown
        and _matrix(row) in base
        and not (row["rank"] and row["variant"] in plain_variants)
    ]
    look = Look("rows of x", "times as fast", title, log_x=True, log_y=True, references={against: 1.0})
    return lines_figure(relative, "rows", "speed", "variant", panel="matrix", look=look)


def _matrix(row: Mapping[str, object]) -> tuple[object, ...]:
    return row["model"], row["out"], row["inputs"], row["rows"]


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _distinct(rows: Sequence[Mapping[str, object]], key: str | None) -> list[object]:
    return [None] if key is None else list(dict.fromkeys(row.get(key) for row in rows))


def _panels(
    rows: Sequence[Mapping[str, object]], panel: str | None, look: Look
) -> tuple[Figure, list[tuple[Axes, list[Mapping[str, object]]]]]:
    if not rows:
        raise ValueError("no row with finite numbers to draw; measure something first")
    names = _distinct(rows, panel)
    columns = 1 if len(names) == 1 else 2 if len(names) <= 4 else 3
    lines = math.ceil(len(names) / columns)
    figure, axes = new_figure(lines, columns, height=3.4 if columns == 1 else 2.6, width=look.width if columns == 1 else 3.6 * columns)
    for spare in axes[len(names) :]:
        spare.set_visible(False)
    with matplotlib.rc_context(STYLE):
        if look.title:
            figure.suptitle(look.title, x=0.01, ha="left", fontsize=10.5, fontweight="bold", color=INK)
        for ax, name in zip(axes, names, strict=False):
            if panel is not None:
                panel_title(ax, str(name))
    return figure, [(ax, [row for row in rows if panel is None or row.get(panel) == name]) for ax, name in zip(axes, names, strict=False)]


def _finish(axes: Axes, rows: Sequence[Mapping[str, object]], x: str, y: str, look: Look) -> None:
    """Axis scales, reference lines and labels of one panel."""
    heights = [real(row[y]) for row in rows] + list(look.references.values())
    for name, value in look.references.items():
        axes.axhline(value, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
        axes.annotate(name, (1.0, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7.5, color=MUTED)
    for which, wanted, values in (("x", look.log_x, [real(row[x]) for row in rows]), ("y", look.log_y, heights)):
        if wanted and min(values) > 0:
            distinct = sorted(set(values)) if which == "x" else []
            nice_log_axis(axes, which, min(values), max(values), distinct if 2 <= len(distinct) <= 8 else ())
        else:
            getattr(axes, f"{which}axis").set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
            axes.margins(0.06)
    axes.set_xlabel(look.xlabel or x)
    axes.set_ylabel(look.ylabel or y)


def _legend(figure: Figure, panels: Sequence[Axes], wanted: bool) -> None:
    if not wanted:
        return
    known: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            known.setdefault(label, handle)
    needed = 0.45 + 0.072 * max(len(label) for label in known)
    columns = max(1, min(4, len(known), int(figure.get_figwidth() / needed)))
    figure.set_figheight(figure.get_figheight() + 0.19 * math.ceil(len(known) / columns))  # the panels keep their height
    with matplotlib.rc_context(STYLE):
        figure.legend(list(known.values()), list(known), loc="outside lower center", ncols=columns, labelcolor=INK)
