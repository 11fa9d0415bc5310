"""Records: JSON there and back, what follows from two perplexities, and numbers that are none."""

import json
import math
from dataclasses import replace

import numpy
import pytest
from bitmend.reports import record as r
from hypothesis import given, settings
from hypothesis import strategies as st

NUMBERS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
PERPLEXITIES = st.floats(1.001, 1e6)
METRICS = st.dictionaries(
    st.text(min_size=1, max_size=5), NUMBERS | st.lists(NUMBERS, max_size=3) | st.booleans() | st.text(max_size=4), max_size=3
)
LAYERS = st.builds(
    r.LayerRecord,
    name=st.sampled_from(["model.layers.3.mlp.down_proj", "lm_head", "h.0.attn.c_attn", "x"]),
    relative_output_error=NUMBERS,
    bits_per_weight=NUMBERS,
    rank=st.none() | st.integers(0, 512),
    sparsity=NUMBERS,
    metrics=METRICS,
)
STAGES = st.builds(
    r.StageRecord,
    stage=st.sampled_from(["baseline", "prune", "quantize.2"]),
    method=st.none() | st.text(max_size=8),
    perplexity=NUMBERS,
    nll_difference_stderr=NUMBERS,
    total_bytes=st.none() | st.integers(0, 2**50),
    notes=st.lists(st.text(max_size=9), max_size=2).map(tuple),
    settings=METRICS,
    metrics=METRICS,
    layers=st.lists(LAYERS, max_size=3).map(tuple),
)
RUNS = st.builds(
    r.RunRecord,
    run=st.text(max_size=8),
    model=st.text(max_size=8),
    protocol=st.builds(
        r.Protocol, dataset=st.none() | st.text(max_size=5), join=st.none() | st.text(max_size=3), bos=st.none() | st.booleans()
    ),
    stages=st.lists(STAGES, max_size=3).map(tuple),
    environment=METRICS,
)


@settings(max_examples=30, deadline=None)
@given(RUNS)
def test_json_round_trip(run: r.RunRecord) -> None:
    assert r.RunRecord.from_json(json.loads(r.dumps(run))) == run


def test_json_has_the_documented_fields_and_null_where_none_applies() -> None:
    data = json.loads(r.dumps(r.RunRecord("a", "m", stages=(r.StageRecord("baseline", layers=(r.LayerRecord("x"),)),))))
    assert data["schema"] == r.SCHEMA == 2 and {"run", "model", "protocol", "stages"} <= set(data)
    wanted = (
        "stage method perplexity perplexity_ratio bits_per_byte nll_difference_stderr kl_to_baseline top1_agreement gap_closed total_bytes"
    )
    wanted += " bits_per_weight sparsity seconds peak_bytes trainable_parameters layers"
    stage = data["stages"][0]
    assert set(wanted.split()) <= set(stage)
    assert all(stage[name] is None for name in wanted.split() if name not in ("stage", "layers"))
    assert {"name", "relative_output_error", "bits_per_weight", "rank", "sparsity"} <= set(stage["layers"][0])


def test_numbers_that_are_not_finite_become_null_and_are_named() -> None:
    layer = r.LayerRecord("m.0.q", relative_output_error=math.nan)
    run = r.RunRecord("a", "m", stages=(r.StageRecord("prune", perplexity=math.inf, metrics={"a": {"b": -math.inf}}, layers=(layer,)),))
    text = r.dumps(run)
    assert "NaN" not in text and "Infinity" not in text
    back = r.RunRecord.from_json(json.loads(text))
    stage = back.stages[0]
    assert stage.perplexity is None and stage.metrics["a"]["b"] is None and stage.layers[0].relative_output_error is None
    assert set(stage.notes) == {"perplexity is not finite", "metrics.a.b is not finite", "layers.0.relative_output_error is not finite"}
    assert r.dumps(back) == text


def test_numbers_of_other_libraries_are_written_as_numbers() -> None:
    run = r.RunRecord("a", "m", stages=(r.StageRecord("prune", perplexity=numpy.float32(2.5), metrics={"n": numpy.int64(3)}),))  # pyright: ignore[reportArgumentType]
    stage = r.RunRecord.from_json(json.loads(r.dumps(run))).stages[0]
    assert stage.perplexity == 2.5 and stage.metrics["n"] == 3


@pytest.mark.parametrize(
    "data, named", [({"schema": 3}, "schema 3"), ({}, "schema None"), ({"schema": 2, "run": "", "model": "", "speed": 1}, "'speed'")]
)
def test_foreign_metrics_are_refused_by_name(data: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        r.RunRecord.from_json(data)


def test_unknown_fields_of_a_stage_are_refused_with_the_stage() -> None:
    with pytest.raises(ValueError, match=r"stage 'prune': unknown field 'perplexities'"):
        r.StageRecord.from_json({"stage": "prune", "perplexities": 1})


@given(PERPLEXITIES, PERPLEXITIES, PERPLEXITIES)
def test_gap_closed_follows_its_definition(perplexity: float, previous: float, baseline: float) -> None:
    closed = r.gap_closed(perplexity, previous, baseline)
    if previous <= baseline:
        assert closed is None
        return
    assert closed is not None
    left = (1 - closed) * math.log(previous / baseline)
    assert left == pytest.approx(math.log(perplexity / baseline), abs=1e-9)


def test_gap_closed_at_its_landmarks() -> None:
    assert r.gap_closed(10.0, 40.0, 10.0) == 1.0
    assert r.gap_closed(40.0, 40.0, 10.0) == 0.0
    assert r.gap_closed(20.0, 40.0, 10.0) == pytest.approx(0.5)
    assert (r.gap_closed(80.0, 40.0, 10.0) or 0) < 0
    assert (r.gap_closed(9.0, 40.0, 10.0) or 0) > 1


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, 0.0, -1.0])
def test_nothing_follows_from_a_missing_or_senseless_perplexity(missing: float | None) -> None:
    assert r.gap_closed(missing, 40.0, 10.0) is None
    assert r.gap_closed(20.0, missing, 10.0) is None
    assert r.gap_closed(20.0, 40.0, missing) is None
    assert r.perplexity_ratio(missing, 10.0) is None and r.perplexity_ratio(10.0, missing) is None


def test_derive_fills_ratio_and_gap_from_the_stages_before() -> None:
    stages = r.derive(
        [r.StageRecord(name, perplexity=value) for name, value in (("baseline", 10.0), ("quantize", 40.0), ("recover", 20.0))]
    )
    assert [stage.perplexity_ratio for stage in stages] == [1.0, 4.0, 2.0]
    assert [stage.gap_closed for stage in stages] == [None, None, pytest.approx(0.5)]


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20)), min_size=2, max_size=20))
def test_paired_difference_is_the_textbook_standard_error(pairs: list[tuple[float, float]]) -> None:
    left, right = zip(*pairs, strict=True)
    mean, error = r.paired_difference(left, right)
    differences = [a - b for a, b in pairs]
    count = len(differences)
    assert mean == pytest.approx(sum(differences) / count, abs=1e-9)
    spread = sum((d - sum(differences) / count) ** 2 for d in differences) / (count - 1)
    assert error == pytest.approx((spread / count) ** 0.5, abs=1e-9)


def test_paired_difference_cancels_what_windows_share_and_needs_the_same_windows() -> None:
    hard = [1.0, 5.0, 3.0]
    assert r.paired_difference([value + 0.5 for value in hard], hard) == (0.5, 0.0)
    assert r.paired_difference([2.0], [1.0]) == (1.0, None)
    with pytest.raises(ValueError, match="got 2 and 3"):
        r.paired_difference([1.0, 2.0], hard)


@pytest.mark.parametrize(
    "name, place",
    [
        ("model.layers.3.mlp.down_proj", (3, "down_proj")),
        ("transformer.h.11.attn.c_attn", (11, "c_attn")),
        ("model.layers.0.mlp.experts.5.w1", (0, "experts.w1")),
        ("lm_head", (None, "lm_head")),
        ("layers.7", (7, "7")),
    ],
)
def test_place_of_reads_block_and_role(name: str, place: tuple[int | None, str]) -> None:
    assert r.place_of(name) == place
    assert (r.LayerRecord(name).block, r.LayerRecord(name).role) == place
    assert r.LayerRecord(name, block=9, role="x").block == 9


def test_the_baseline_is_found_by_name_and_else_is_the_first() -> None:
    stages = (r.StageRecord("import"), r.StageRecord("baseline"))
    assert r.RunRecord("a", "m", stages=stages).baseline == stages[1]
    assert r.RunRecord("a", "m", stages=(replace(stages[0]),)).baseline == stages[0]
    assert r.RunRecord("a", "m").baseline is None


def test_metrics_of_schema_1_are_read_with_each_methods_own_error_under_its_name() -> None:
    """What it called relative_output_error was a root, under the statistics that a method collected: nothing to compare."""
    layers = [{"name": "m.0.q", "relative_output_error": 0.2, "metrics": {"relative_error": 0.1}}, {"name": "m.1.q"}]
    old = {"schema": 1, "run": "a", "model": "m", "stages": [{"stage": "quantize", "layers": layers}]}
    first, second = r.RunRecord.from_json(old).stages[0].layers
    assert first.relative_output_error is None and first.metrics == {"relative_error": 0.1, "root_relative_error": 0.2}
    assert second.relative_output_error is None and second.metrics == {}
    again = r.RunRecord.from_json(json.loads(r.dumps(r.RunRecord.from_json(old))))
    assert again.stages[0].layers == (first, second), "written as schema 2 and read"
