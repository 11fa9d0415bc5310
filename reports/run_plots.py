"""The figures of one run: perplexity by stage, size against perplexity, layer heat maps, allocation.

Each function takes stages or layers and returns a figure, or None where there is nothing to draw.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .drawing import INK, MUTED, PALETTE, PAPER, STYLE, new_figure, nice_log_axis, panel_title, place_labels, plain
from .json_values import is_finite
from .record import LayerRecord, StageRecord
from .units import number

ARROW_POINTS = 16.0
"""A shorter way between two stages is all arrow head: they are drawn without one."""
STAGE_COLORS = {
    "baseline": "#64748b",
    "prune": "#e8890c",
    "quantize": "#e03e6d",
    "decompose": "#3478f6",
    "recover": "#12a06e",
    "fuse": "#8b5cf6",
}


def stage_color(stage: str, index: int) -> str:
    return STAGE_COLORS.get(stage.split(".")[0], PALETTE[index % len(PALETTE)])


def perplexity_by_stage(stages: Sequence[StageRecord]) -> Figure | None:
    """Perplexity after every stage, with two paired standard errors of the difference to the baseline."""
    known = [stage for stage in stages if is_finite(stage.perplexity) and (stage.perplexity or 0) > 0]
    if not known:
        return None
    figure, (axes,) = new_figure(height=2.9)
    values = [float(stage.perplexity or 0.0) for stage in known]
    places = range(len(known))
    axes.plot(places, values, color=MUTED, linewidth=1.3, zorder=2)
    axes.axhline(values[0], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
    for place, (stage, value) in enumerate(zip(known, values, strict=True)):
        half = math.exp(2 * (stage.nll_difference_stderr or 0.0))
        errors = [[value - value / half], [value * half - value]]
        color = stage_color(stage.stage, place)
        axes.errorbar([place], [value], yerr=errors, color=color, marker="o", markersize=7, capsize=3, zorder=3, markeredgecolor=PAPER)
        top = value * half
        note = axes.annotate(number(value), (place, top), (0, 7), textcoords="offset points", ha="center", va="bottom", fontweight="bold")
        note.set(fontsize=8.5, color=INK, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.6})
    _perplexity_axis(axes, values)
    crowded = len(known) > 7
    axes.set_xticks(list(places), [_label(stage) for stage in known], rotation=35 if crowded else 0, ha="right" if crowded else "center")
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.grid(False, axis="x")
    axes.margins(x=0.08)
    return figure


def size_against_perplexity(stages: Sequence[StageRecord], rivals: Sequence[StageRecord] = ()) -> Figure | None:
    """The run's way through (bytes on disk, perplexity), stage after stage: a panel for each text. `rivals` are single points."""
    names = [None, *dict.fromkeys(name for stage in stages for name in stage.texts)]
    drawn = [(name, _placed(stages, name), _placed(rivals, name)) for name in names]
    drawn = [(name, way, others) for name, way, others in drawn if way]
    if not drawn:
        return None
    figure, panels = new_figure(len(drawn), 1, height=2.9)
    for axes, (name, way, others) in zip(panels, drawn, strict=True):
        _size_panel(axes, way, others)
        if len(drawn) > 1:
            panel_title(axes, name or "the run's text")
        if axes is not panels[-1]:
            axes.set_xlabel("")
    return figure


def _placed(stages: Sequence[StageRecord], text: str | None) -> list[tuple[float, float, str]]:
    """(MB on disk, perplexity on the text, name) of the stages that have both."""
    result = []
    for stage in stages:
        measured = stage if text is None else stage.texts.get(text)
        perplexity = measured.perplexity if measured is not None else None
        if _positive(perplexity) and stage.total_bytes:
            result.append((float(stage.total_bytes) / 1e6, float(perplexity or 0.0), stage.stage))
    return result


def _size_panel(axes: Axes, way: Sequence[tuple[float, float, str]], rivals: Sequence[tuple[float, float, str]]) -> None:
    sizes, values, _ = zip(*way, strict=True)
    for index, (size, value, stage) in enumerate(way):
        axes.scatter([size], [value], s=48, color=stage_color(stage, index), edgecolors=PAPER, linewidths=0.8, zorder=3)
    for size, value, _ in rivals:
        axes.scatter([size], [value], s=40, facecolors="none", edgecolors=MUTED, linewidths=1.2, zorder=2)
    every = [*way, *rivals]
    _perplexity_axis(axes, [value for _, value, _ in every])
    low, high = min(size for size, _, _ in every), max(size for size, _, _ in every)
    if high > 2.5 * low:
        nice_log_axis(axes, "x", low / 1.1, high * 1.1)
    else:
        axes.set_xlim(low - 0.15 * (high - low or low), high + 0.15 * (high - low or low))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    for start in range(len(way) - 1):
        if _points_apart(axes, sizes, values, start) > ARROW_POINTS:
            axes.annotate(
                "",
                (sizes[start + 1], values[start + 1]),
                (sizes[start], values[start]),
                arrowprops={"arrowstyle": "-|>", "color": MUTED, "linewidth": 1.1, "shrinkA": 4, "shrinkB": 4},
            )
    axes.set_xlabel("size on disk, MB")
    along = [point for start in range(len(way) - 1) for point in _between(axes, sizes, values, start)]
    place_labels(axes, every, size=8.0, avoid=along)


def error_heat_map(stages: Sequence[StageRecord]) -> Figure | None:
    """Relative output error of every linear, blocks across and roles down, one panel per stage on one colour scale."""
    known = [stage for stage in stages if any(_positive(layer.relative_output_error) for layer in stage.layers)]
    if not known:
        return None
    values = [
        float(layer.relative_output_error or 0) for stage in known for layer in stage.layers if _positive(layer.relative_output_error)
    ]
    low, high = sorted(values)[len(values) // 50], max(values)
    norm = LogNorm(low, high) if high > 4 * low else Normalize(min(low, 0.999 * high), high)
    titles = [f"after {_label(stage, ', ')}" for stage in known]
    return _heat_maps([stage.layers for stage in known], lambda layer: layer.relative_output_error, titles, norm, "relative output error")


def allocation(layers: Sequence[LayerRecord]) -> Figure | None:
    """Bits and rank by layer: two heat maps (the second only where a rank was given)."""
    if not any(layer.bits_per_weight is not None for layer in layers):
        return None
    bits = [float(layer.bits_per_weight) for layer in layers if layer.bits_per_weight is not None]
    ranked = any(layer.rank for layer in layers)
    figure, axes = new_figure(1 + ranked, 1, height=_map_height(layers))
    _heat_panel(
        figure, axes[0], layers, lambda layer: layer.bits_per_weight, Normalize(min(bits) - 1e-3, max(bits) + 1e-3), "bits per weight"
    )
    panel_title(axes[0], "bits per weight, everything stored")
    if ranked:
        highest = max(layer.rank or 0 for layer in layers)
        _heat_panel(figure, axes[1], layers, lambda layer: layer.rank or 0, Normalize(0, highest), "rank")
        panel_title(axes[1], "rank of the low-rank term")
    return figure


def predicted_against_measured(layers: Sequence[LayerRecord]) -> Figure | None:
    """The loss an allocation predicted for every layer against the one measured afterwards, both logarithmic."""
    pairs = [(layer.metrics.get("predicted_loss"), layer.metrics.get("measured_loss"), layer) for layer in layers]
    kept = [(float(p), float(m), layer) for p, m, layer in pairs if _positive(p) and _positive(m)]
    if not kept:
        return None
    figure, (axes,) = new_figure(height=3.3)
    for index, role in enumerate(dict.fromkeys(layer.role for *_, layer in kept)):
        chosen = [(p, m) for p, m, layer in kept if layer.role == role]
        axes.scatter(*zip(*chosen, strict=True), s=16, color=PALETTE[index % len(PALETTE)], label=role, edgecolors=PAPER, linewidths=0.4)
    low, high = min(min(p, m) for p, m, _ in kept), max(max(p, m) for p, m, _ in kept)
    axes.plot([low, high], [low, high], color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
    for which in "xy":
        nice_log_axis(axes, which, low, high)
    axes.set_xlabel("predicted loss")
    axes.set_ylabel("measured loss")
    with matplotlib.rc_context(STYLE):
        axes.legend(loc="upper left", labelcolor=INK, handletextpad=0.2, borderpad=0.1)
    return figure


def training(stage: StageRecord) -> Figure | None:
    """Loss and held-out loss by step from `metrics["history"]` (rows with `step` and one of the losses)."""
    history = stage.metrics.get("history")
    if not isinstance(history, list | tuple):
        return None
    steps = [row for row in history if isinstance(row, Mapping) and is_finite(row.get("step"))]
    drawn = {name: [(row["step"], row[name]) for row in steps if is_finite(row.get(name))] for name in ("loss", "held_out_loss")}
    drawn = {name: points for name, points in drawn.items() if len(points) > 1}
    if not drawn:
        return None
    figure, axes = new_figure(len(drawn), 1, height=3.0 / len(drawn) + 0.3, sharex=True)
    best = stage.metrics.get("best_step")
    for ax, (name, points) in zip(axes, drawn.items(), strict=True):
        marked = len(points) <= 30
        ax.plot(*zip(*points, strict=True), color=STAGE_COLORS["recover"], linewidth=1.6, marker="o" if marked else None, markersize=3.5)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
        panel_title(ax, "held-out loss, nats per token" if name == "held_out_loss" else "training loss")
        if is_finite(best):
            ax.axvline(best, color=MUTED, linestyle=(0, (4, 3)), linewidth=1.0, zorder=1)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def _points_apart(axes: Axes, sizes: Sequence[float], values: Sequence[float], start: int) -> float:
    """How far apart stage `start` and the next are drawn."""
    (x0, y0), (x1, y1) = axes.transData.transform([(sizes[start], values[start]), (sizes[start + 1], values[start + 1])])
    figure = axes.get_figure(root=True)
    assert figure is not None
    return math.hypot(x1 - x0, y1 - y0) * 72 / figure.dpi


def _between(axes: Axes, sizes: Sequence[float], values: Sequence[float], start: int) -> list[tuple[float, float]]:
    """Points along the drawn arrow from stage `start` to the next."""
    (x0, y0), (x1, y1) = axes.transData.transform([(sizes[start], values[start]), (sizes[start + 1], values[start + 1])])
    along = [(x0 + (x1 - x0) * step / 40, y0 + (y1 - y0) * step / 40) for step in range(41)]
    return [tuple(point) for point in axes.transData.inverted().transform(along)]


def _perplexity_axis(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    reach = max(high / low, 1.02) ** 0.18
    nice_log_axis(axes, "y", low / reach, high * reach)
    axes.set_ylabel("perplexity")


def _label(stage: StageRecord, joint: str = "\n") -> str:
    return f"{stage.stage}{joint}{stage.method}" if stage.method and stage.method != stage.stage else stage.stage


def _positive(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


ROLE_ORDER = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "query_key_value",
    "c_attn",
    "o_proj",
    "out_proj",
    "dense",
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "c_fc",
    "fc1",
    "down_proj",
    "fc2",
]


def _role_place(role: str | None) -> int:
    """Attention before MLP, in the order the data flows; unknown roles follow as they came."""
    return ROLE_ORDER.index(role) if role in ROLE_ORDER else len(ROLE_ORDER)


def _map_height(layers: Sequence[LayerRecord]) -> float:
    return 0.75 + 0.17 * len(dict.fromkeys(layer.role for layer in layers))


def _heat_maps(
    panels: Sequence[Sequence[LayerRecord]],
    value: Callable[[LayerRecord], float | None],
    titles: Sequence[str],
    norm: Normalize,
    label: str,
) -> Figure:
    figure, axes = new_figure(len(panels), 1, height=max(_map_height(layers) for layers in panels))
    for ax, layers, title in zip(axes, panels, titles, strict=True):
        _heat_panel(figure, ax, layers, value, norm, label if ax is axes[-1] else None)
        panel_title(ax, title)
    return figure


def _heat_panel(
    figure: Figure,
    axes: Axes,
    layers: Sequence[LayerRecord],
    value: Callable[[LayerRecord], float | None],
    norm: Normalize,
    label: str | None,
) -> None:
    """Blocks across, roles down; layers of one place (experts) are averaged; layers outside the blocks are the last column."""
    roles = sorted(dict.fromkeys(layer.role for layer in layers), key=_role_place)
    blocks = sorted({layer.block for layer in layers if layer.block is not None})
    columns: list[int | None] = [*blocks, *([None] if any(layer.block is None for layer in layers) else [])]
    result: dict[tuple[object, object], list[float]] = {}
    for layer in layers:
        measured = value(layer)
        if measured is not None and math.isfinite(measured):
            result.setdefault((layer.role, layer.block), []).append(float(measured))
    grid = [[fmean(result[role, block]) if (role, block) in result else math.nan for block in columns] for role in roles]
    edges_x, edges_y = range(len(columns) + 1), range(len(roles) + 1)
    mesh = axes.pcolormesh(
        edges_x, edges_y, grid, norm=norm, cmap="viridis", edgecolors=PAPER, linewidth=0.4 if len(columns) <= 48 else 0.0
    )
    axes.set_yticks([index + 0.5 for index in range(len(roles))], [str(role) for role in roles])
    axes.invert_yaxis()
    step = max(1, math.ceil(len(columns) / 10))
    ticks = [index for index in range(0, len(columns), step) if columns[index] is not None]
    axes.set_xticks([index + 0.5 for index in ticks], [str(columns[index]) for index in ticks])
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if label is not None:
        axes.set_xlabel("block")
        with matplotlib.rc_context(STYLE):
            _color_bar(figure, axes, mesh, norm)


def _color_bar(figure: Figure, axes: Axes, mesh: QuadMesh, norm: Normalize) -> None:
    drawn = mesh.get_array()
    below = norm.vmin is not None and drawn is not None and bool((drawn < norm.vmin).any())
    bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", fraction=0.12, pad=0.02, aspect=40, extend="min" if below else "neither")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 1.0)
    if isinstance(norm, LogNorm):
        nice_log_axis(bar.ax, "x", low, high)
    else:
        bar.ax.xaxis.set_major_locator(MaxNLocator(5, integer=low == 0.0))  # ranks, and nothing else, begin at 0
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    bar.ax.tick_params(length=0)
