"""Style and output of figures: inline SVG for pages, files for publishing, axes and labels.

Knows matplotlib and nothing of what is drawn. Figures never touch pyplot's global state. An inline SVG takes its ink and
paper from the page's CSS (`--ink`, `--muted`, `--rule`, `--paper`), so that one drawing serves light, dark and print.
"""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from .units import number

INK, MUTED, RULE, PAPER = "#101827", "#6a7280", "#e2e5ea", "#fdfdfe"
THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAPER: "var(--paper)"}
PALETTE = ("#3478f6", "#e8590c", "#12a06e", "#8b5cf6", "#e03e6d", "#0aa5c2", "#b58900", "#7a6652", "#d946c0", "#5c7c10")
MARKERS = "osD^vPXph*"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "legend.frameon": False,
    "savefig.dpi": 160,
}
WIDTH = 4.7


def new_figure(
    rows: int = 1, columns: int = 1, height: float = 3.0, width: float = WIDTH, sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of rows × columns panels, each `height` inches high; its axes row by row."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height * rows), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex)
    return figure, list(axes.ravel())


def inline_svg(figure: Figure, prefix: str, description: str) -> str:
    """The figure as an <svg> element for a page: no outside reference, ids under `prefix`, colours from the page."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\sid="([^"]+)"', rf' id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    svg = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", svg)
    svg = re.sub(r"(font: (?:[\w.]+ )*?[\d.]+px) [^;\"]+", r"\1 var(--sans)", svg)
    for color, variable in THEMED.items():
        svg = svg.replace(color, variable)
    label = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1).strip()


def save(figure: Figure, path: Path) -> list[Path]:
    """Writes `path` with the suffixes .png and .svg (fixed colours) and returns both paths."""
    written = []
    with matplotlib.rc_context({**STYLE, "svg.fonttype": "path"}):
        for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            target = path.with_name(path.name + suffix)
            scratch = path.with_name(f".{path.name}.partial{suffix}")
            figure.savefig(scratch, metadata=metadata)
            scratch.replace(target)
            written.append(target)
    return written


def nice_log_axis(axes: Axes, which: str, low: float, high: float, ticks: Sequence[float] = ()) -> None:
    """A logarithmic axis with round, plainly written ticks, also where it spans less than a decade; or with the given ticks."""
    margin = max(1.06, (high / low) ** 0.04)
    low, high = low / margin, high * margin
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(list(ticks) or _log_ticks(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def plain(value: float) -> str:
    """A tick's number with no more digits than it needs."""
    if value == 0 or not 1e-3 <= abs(value) < 1e7:
        return f"{value:g}"
    return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"


def panel_title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9, fontweight="bold", color=INK)


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float, str]], size: float = 7.5, avoid: Sequence[tuple[float, float]] = ()
) -> None:
    """Writes a label next to each point where it covers no point, no other label and nothing of `avoid`, or as little as can be.

    Points on top of each other share one label.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    scale = 72.0 / figure.dpi
    at = [(*(axes.transData.transform((x, y)) * scale), text) for x, y, text in points]
    frame, paper = axes.get_window_extent(), figure.bbox
    right, top = min(frame.x1 + 12.0 / scale, paper.x1), min(frame.y1 + 12.0 / scale, paper.y1)
    inside = (frame.x0 * scale, frame.y0 * scale, right * scale, top * scale)
    taken = [(x - 3.5, y - 3.5, x + 3.5, y + 3.5) for x, y, _ in at]
    taken += [(x - 1.0, y - 1.0, x + 1.0, y + 1.0) for x, y in (axes.transData.transform(point) * scale for point in avoid)]
    for index, texts in _bunched(at):
        text, (x, y, _) = ", ".join(texts), at[index]
        box = _free_place(x, y, TextPath((0, 0), text, size=size).get_extents().x1, 1.15 * size, taken, inside)
        taken.append(box)
        place, offset = points[index][:2], (box[0] - x, box[1] - y)
        note = axes.annotate(text, place, offset, textcoords="offset points", fontsize=size, color=INK, ha="left", va="bottom")
        note.set_in_layout(False)


Box = tuple[float, float, float, float]


def _bunched(at: Sequence[tuple[float, float, str]]) -> list[tuple[int, list[str]]]:
    """(first point, texts) of every bunch of points nearer than three typographic points to its first."""
    bunches: list[tuple[int, list[str]]] = []
    for index, (x, y, text) in enumerate(at):
        near = next((texts for first, texts in bunches if math.hypot(at[first][0] - x, at[first][1] - y) < 3.0), None)
        if near is None:
            bunches.append((index, [text]))
        elif text not in near:
            near.append(text)
    return bunches


def _free_place(x: float, y: float, width: float, height: float, taken: Sequence[Box], inside: Box) -> Box:
    """Of 24 places around a point the one that covers least; nearer and first-named places win ties."""
    choices = []
    for distance in (5.0, 10.0, 17.0):
        for across, up in ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            left = x + across * distance + (0.0 if across > 0 else -width if across < 0 else -width / 2)
            bottom = y + up * distance + (0.0 if up > 0 else -height if up < 0 else -height / 2)
            box = (left, bottom, left + width, bottom + height)
            outside = box[0] < inside[0] or box[1] < inside[1] or box[2] > inside[2] or box[3] > inside[3]
            covered = sum(_overlap(box, other) for other in taken) + (1e4 if outside else 0.0)
            choices.append((covered + 0.5 * distance, len(choices), box))
    return min(choices)[2]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**power for power in decades for step in steps if low <= step * 10.0**power <= high]
        if len(ticks) >= 4:
            return ticks
    return [
        float(tick) for tick in MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high) if low <= tick <= high and tick > 0
    ]


def describe(rows: Sequence[tuple[str, float | None]], unit: str = "") -> str:
    """An image description: "baseline 28.69, quantize 43.40"."""
    return ", ".join(f"{name} {number(value)}{unit}" for name, value in rows if value is not None)
