"""Figures: the Pareto line is the Pareto line, axes hold their points, labels keep clear, missing numbers are left out."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bitmend.reports import drawing, run_plots
from bitmend.reports.page import html
from bitmend.reports.pareto import pareto_front
from bitmend.reports.plain_rows import ROWS, rivals
from bitmend.reports.plots import LOG_Y, Look, kernels_figure, lines_figure, pareto_figure
from bitmend.reports.record import LayerRecord, RunRecord, StageRecord
from hypothesis import given
from hypothesis import strategies as st

POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=15)


@given(POINTS)
def test_pareto_front_holds_exactly_the_unbeaten(points: list[tuple[int, int]]) -> None:
    front = [points[index] for index in pareto_front(points)]
    unbeaten = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert set(front) == unbeaten and len(front) == len(unbeaten)
    assert front == sorted(front)


def test_pareto_figure_draws_the_line_through_the_front_and_labels_all() -> None:
    rows = [
        {"method": name, "total_bytes": x, "perplexity": y}
        for name, x, y in (("a", 1.0, 9.0), ("b", 2.0, 5.0), ("c", 3.0, 6.0), ("d", 4.0, 3.0))
    ]
    rows.append({"method": "lost", "total_bytes": 5.0, "perplexity": math.nan})
    axes = pareto_figure(rows, look=Look(log_y=True, references={"baseline": 2.5})).axes[0]
    line = next(line for line in axes.lines if line.get_label() == "Pareto line")
    assert np.asarray(line.get_xydata())[:, 0].tolist() == [1.0, 2.0, 4.0]
    assert {"a", "b", "c", "d", "baseline"} <= {text.get_text() for text in axes.texts}
    assert axes.get_ylim()[0] < 2.5 and axes.get_ylim()[1] > 9


def test_lines_figure_sorts_by_x_groups_by_series_and_panels() -> None:
    rows = [
        {"sparsity": s, "perplexity": 20 + 10 * s + k, "subset": f"s{k}", "pattern": p}
        for p in ("free", "2:4")
        for k in (0, 1)
        for s in (0.7, 0.5, 0.6)
    ]
    figure = lines_figure(rows, "sparsity", "perplexity", "subset", panel="pattern", look=LOG_Y)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["free", "2:4"]
    for axes in figure.axes:
        assert [list(container.lines[0].get_xdata()) for container in axes.containers] == [[0.5, 0.6, 0.7]] * 2  # pyright: ignore[reportAttributeAccessIssue]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["s0", "s1"]


def test_figures_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no row with finite numbers"):
        lines_figure([{"x": 1, "y": None}], "x", "y")


def test_kernels_figure_divides_by_the_same_matrix_and_shows_the_nearest_rank() -> None:
    times = (
        (1, "torch bfloat16", 10.0),
        (1, "triton fused", 4.0),
        (16, "torch bfloat16", 12.0),
        (16, "triton fused", 12.0),
        (64, "triton fused", 5.0),
    )
    rows: list[dict] = [
        {
            "operator": "W4A16",
            "model": "1B",
            "out": out,
            "inputs": 64,
            "rows": m,
            "rank": rank,
            "variant": variant if rank or "torch" in variant else "triton without rank",
            "microseconds": us * scale + rank,
        }
        for out, scale in ((64, 1.0), (256, 3.0))
        for rank in (0, 16, 128)
        for m, variant, us in times
    ]
    rows.append(
        {"operator": "quantize", "model": "1B", "out": 64, "inputs": 64, "rows": 1, "rank": 16, "variant": "quantize", "microseconds": 1.0}
    )
    rows.append({"operator": "30 blocks' linears", "model": "demo", "rows": 1, "rank": 0, "variant": "fused", "microseconds": 1.0})
    figure = kernels_figure(rows)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["1B: 64 × 64", "1B: 256 × 64"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["W4A16 triton without rank", "W4A16 triton fused, rank 16"]
    drawn = [[list(container.lines[0].get_ydata()) for container in axes.containers] for axes in figure.axes]  # pyright: ignore[reportAttributeAccessIssue]
    assert drawn == [[[10 / 4, 12 / 12], [10 / 20, 12 / 28]], [[30 / 12, 36 / 36], [30 / 28, 36 / 52]]]


@pytest.mark.parametrize("low, high", [(28.7, 43.4), (1.0, 1.01), (5.47, 20.85), (2.0, 1e6), (1e-6, 3e-4)])
def test_log_axes_have_a_few_round_ticks_inside(low: float, high: float) -> None:
    figure, (axes,) = drawing.new_figure()
    drawing.nice_log_axis(axes, "y", low, high)
    figure.draw_without_rendering()
    ticks = [tick for tick in axes.get_yticks() if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    assert 3 <= len(ticks) <= 13
    assert all(len(label.get_text()) <= 9 for label in axes.get_yticklabels())


def test_labels_do_not_cover_each_other_and_points_together_share_one() -> None:
    figure, (axes,) = drawing.new_figure()
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 10)
    points = [
        (5.0, 5.0, "first"),
        (5.0, 5.0, "second"),
        (5.3, 5.2, "third"),
        (5.0, 5.9, "fourth"),
        (9.9, 9.9, "corner"),
        (10.0, 2.0, "right edge"),
    ]
    drawing.place_labels(axes, points)
    figure.draw_without_rendering()
    assert [text.get_text() for text in axes.texts] == ["first, second", "third", "fourth", "corner", "right edge"]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[index + 1 :])


def test_run_figures_exist_where_there_is_something_to_draw(full_run: RunRecord) -> None:
    stages = full_run.stages
    assert run_plots.perplexity_by_stage(stages)
    sizes = run_plots.size_against_perplexity(stages, [replace(stages[2], stage="plain", texts={"code": stages[0].texts["code"]})])
    assert sizes is not None and [axes.get_title(loc="left") for axes in sizes.axes] == ["the run's text", "news", "code"]
    assert [any("plain" in text.get_text() for text in axes.texts) for axes in sizes.axes] == [True, False, True]
    heat = run_plots.error_heat_map(stages)
    assert heat is not None and [axes.get_title(loc="left") for axes in heat.axes][:3] == [
        "after prune, wanda", "after quantize, gptq", "after decompose, qera_exact"
    ]  # fmt: skip
    assert run_plots.allocation(stages[3].layers) and run_plots.predicted_against_measured(stages[3].layers)
    bare = [LayerRecord("model.layers.0.q")]
    assert run_plots.perplexity_by_stage([]) is None and run_plots.size_against_perplexity([]) is None
    assert (
        run_plots.error_heat_map(stages[:1]) is None
        and run_plots.allocation(bare) is None
        and run_plots.predicted_against_measured(bare) is None
    )


def test_training_is_drawn_where_there_is_a_history() -> None:
    history = [{"step": 0, "held_out_loss": 3.2}, {"step": 1, "loss": 0.3}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 0.2}]
    figure = run_plots.training(StageRecord("recover", metrics={"history": [*history, {"step": 3, "held_out_loss": 3.1}], "best_step": 3}))
    assert figure is not None and len(figure.axes) == 2
    assert [list(axes.lines[0].get_xdata()) for axes in figure.axes] == [[1, 3], [0, 3]]  # pyright: ignore[reportArgumentType]
    assert run_plots.training(StageRecord("recover", metrics={"history": history[:2]})) is None
    assert run_plots.training(StageRecord("recover")) is None


def test_heat_map_puts_layers_in_their_place_and_averages_experts() -> None:
    layers = [LayerRecord(f"model.layers.{block}.mlp.experts.{e}.w1", 0.1 * (block + 1) + 0.02 * e) for block in (0, 2) for e in (0, 1)]
    layers += [LayerRecord("model.layers.0.attn.q", 0.5), LayerRecord("lm_head", 0.7)]
    figure = run_plots.error_heat_map([StageRecord("quantize", layers=tuple(layers))])
    assert figure is not None
    grid = figure.axes[0].collections[0].get_array()
    assert grid is not None and grid.shape == (3, 3)
    assert (
        grid[0, 0] == pytest.approx(0.11)
        and grid[0, 1] == pytest.approx(0.31)
        and grid[1, 0] == pytest.approx(0.5)
        and grid[2, 2] == pytest.approx(0.7)
    )
    missing = np.ma.getmaskarray(grid)
    assert missing[0, 2] and missing[1, 1] and missing[2, 0]


def test_saved_files_are_whole_and_repeat_byte_for_byte(tmp_path: Path) -> None:
    rows = [{"x": 1, "y": 2}, {"x": 2, "y": 1}]
    first = [path.read_bytes() for path in drawing.save(lines_figure(rows, "x", "y"), tmp_path / "a.b")]
    second = [path.read_bytes() for path in drawing.save(lines_figure(rows, "x", "y"), tmp_path / "a.b")]
    assert first == second and sorted(path.name for path in tmp_path.iterdir()) == ["a.b.png", "a.b.svg"]


def test_the_plain_rows_are_drawn_with_a_run_that_was_measured_as_they_were(full_run: RunRecord) -> None:
    published = RunRecord.from_json(json.loads(ROWS.read_text(encoding="utf-8")))
    run = replace(full_run, model="demo", protocol=published.protocol, texts={**published.texts, "code": full_run.texts["code"]})
    actual = rivals(run)
    assert [row.stage for row in actual] == ["RTN", "GPTQ", "NF4", "AutoRound"] and all(list(row.texts) == ["news"] for row in actual)
    assert all(label in html(run) for label in ("Circles: plain methods", "RTN", "NF4"))
    for other in (replace(run, model="org/m"), replace(run, protocol=replace(run.protocol, windows=40))):
        assert not rivals(other) and "Circles" not in html(other)
