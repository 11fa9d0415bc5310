"""What `pipeline plan` says of several ranks: one rank is the dry run; sums travel as counted; where more of them stop helping."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines import cli
from bitmend.pipelines.bench.collectives import Event, critical_seconds, within
from bitmend.pipelines.bench.synthetic import SHAPES, config_of
from bitmend.pipelines.devices.link import Link, given_link
from bitmend.pipelines.devices.rates import Speeds, Work
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.models.structure import skeleton
from bitmend.pipelines.planning import plan, run_costs
from bitmend.pipelines.planning.division import Divided, Exchange, Piece, in_turn
from bitmend.pipelines.planning.scale_out import ScaleOut, predicted
from bitmend.pipelines.ranks import exchange
from bitmend.pipelines.recipes.recipe import Recipe, resolve

from ..runs import CHAIN, Processes, chosen

SPEEDS = Speeds({torch.float32: 4e13, torch.bfloat16: 4e14, torch.float64: 3e13}, 2e12, 3e12, 2e5, 1e9, 1e11)
"""About a card's, so that no measurement decides what a test says."""
BRIEF = ["recover.seq_len=64", "recover.batch_size=1", "recover.gradient_checkpointing=false", "recover.steps=2000"]
"""A step whose activations are counted in a moment."""
LINK = Link(25e9, 30e-6, "given")


@pytest.fixture(autouse=True)
def known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_costs, "measured", lambda compute: SPEEDS)


def test_one_rank_is_the_dry_run(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    recipe = chosen(tmp_path, small_model, small_text, [*CHAIN[:3], {"quantize": {"method": "learned_rounding", "steps": 3}}, *CHAIN[3:]])
    rows = predicted(plan.costed(recipe, device="cpu"), (1, 2), LINK)["stages"]
    expected = plan.predict(recipe, device="cpu")["stages"]
    alone, two = ([row for row in rows if row["ranks"] == size] for size in (1, 2))
    assert [(row["stage"], row["seconds"]) for row in alone] == [(row["stage"], row["seconds"]) for row in expected]
    for row, other in zip(alone, expected, strict=True):
        assert row["sent_bytes"] == row["collectives"] == 0 and row["efficiency"] == 1.0
        assert row["device_bytes"] == pytest.approx(other["device_bytes"], rel=0.2)  # between the two this process has grown
    assert all(row["collectives"] > 0 for row in two)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_pieces_are_all_done_and_none_twice(size: int) -> None:
    shared = in_turn("batches", Work(calls=60.0), [2.0] * 14 + [1.0, 1.0], 3.0)
    assert sum(load.calls for load in shared.loads(size)) == pytest.approx(60.0) and shared.whole().calls == pytest.approx(60.0)
    assert max(load.calls for load in shared.loads(size)) >= 60.0 / size
    pieces = tuple(Piece(Work(calls=cost), cost, number // 2) for number, cost in enumerate((5.0, 3.0, 3.0, 1.0)))
    solved = Divided("matrices", pieces, 1.0, {0: Work(calls=10.0), 1: Work(calls=20.0)}, by_cost=True)
    assert solved.whole().calls == 42.0
    assert max(load.calls for load in solved.loads(2)) == 36.0, "5 and 1, 3 and 3: both ranks need both factors"


def plan_of(shape: str, *sets: str, sizes: tuple[int, ...] = (1, 8, 64), recipe: str = "compress_and_recover") -> tuple[dict[str, Any], plan.Costed]:
    asked: Recipe = resolve(recipe, sets=[*BRIEF, *sets], options={"model": shape, "profile": "standard", "dtype": "bfloat16"})
    made = plan.costed_of_config(asked, config_of(SHAPES[shape]), "cpu")
    return predicted(made, sizes, LINK), made


@pytest.mark.parametrize("shape, parameters", [("8b", 8_030_261_248), ("70b", 70_553_706_496), ("405b", 405_853_388_800)])
def test_shapes_of_models_that_nobody_has(shape: str, parameters: int) -> None:
    assert sum(p.numel() for p in skeleton(config_of(SHAPES[shape])).parameters()) == parameters
    report, made = plan_of(shape)
    fleet, needs = ScaleOut(SPEEDS, LINK), {stage: actual[:-1] for stage, actual in made.needs.items()}
    assert report["parameters"] == parameters
    enough = {row["stage"]: row["ranks"] for row in report["where_more_ranks_stop_helping"]}
    assert enough["quantize"] <= 8 and enough["recover"] == 1 and enough["baseline"] == 1 and enough["an evaluation"] > 8
    in_slots = [fleet.terms(needs["quantize"], size)["slots of calibration text"].seconds for size in (1, 8, 64)]
    assert in_slots == pytest.approx([in_slots[0], in_slots[0] / 8, in_slots[0] / 8]), "128 windows in 8 slots"
    solving = [fleet.terms(needs["quantize"], size)["matrices of a block"].seconds for size in (1, 4, 8)]
    assert solving[1] == solving[2] > 0.25 * solving[0], "four inputs, of which the widest costs most"
    notes = [row["note"] for row in report["notes"]]
    assert notes[0].startswith("quantize on 64 ranks: calibration text has 8 slots") and notes[-1].startswith("above 8 ranks a run is refused")
    assert any("recover.accumulation=64" in note for note in notes)


def test_an_evaluation_is_of_all_texts_and_loads_the_blocks_once() -> None:
    one, three = (plan_of("8b", f"evaluation.also={also}")[1].needs["baseline"][-1] for also in ("[]", "[news,code]"))
    assert three.hidden == pytest.approx(3 * one.hidden)
    assert three.alone == one.alone and three.device == one.device
    assert three.divided[0].whole().passes == pytest.approx(3 * one.divided[0].whole().passes)


def test_recovery_with_as_many_micro_batches_as_ranks_goes_on(tmp_path: Path) -> None:
    report, _ = plan_of("8b", "recover.accumulation=64", sizes=(1, 64))
    enough = {row["stage"]: row["ranks"] for row in report["where_more_ranks_stop_helping"]}
    assert enough["recover"] >= 16
    recover = {row["ranks"]: row for row in report["stages"] if row["stage"] == "recover"}
    assert recover[64]["seconds"] < 0.1 * recover[1]["seconds"] and not any("accumulation" in row["note"] for row in report["notes"])


def test_what_a_link_and_ranks_may_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert (given_link("25,20").bytes_per_second, given_link("25,20").latency_seconds) == (25e9, pytest.approx(20e-6))
    for text in ("", "fast", "0", "-1", "1,2,3", "nan"):
        with pytest.raises(UsageError, match="expected GB/s"):
            given_link(text)
    for arguments, expected in (
        (["--ranks", "2,0"], "--ranks 2,0: expected numbers of processes"),
        (["--shape", "8c", "--link", "1"], "did you mean"),
        (["--shape", "8b", "-m", "demo"], "give one of them"),
        (["--shape", "8b", "--link", "1", "--set", "quantize.group_size=4097"], "this run would be refused"),
    ):
        assert cli.main(["plan", "compress_and_recover", *arguments]) == 2
        assert expected in capsys.readouterr().err


def test_what_bench_scale_takes(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in ((["--method", "recover"], "did you mean 'recovery'"), (["-m", "demo"], "a model of its own")):
        assert cli.main(["bench", "scale", *arguments]) == 2
        assert expected in capsys.readouterr().err


def test_the_critical_path_is_the_longest_of_every_stretch() -> None:
    def events(*stretches: float) -> list[Event]:
        actual, now = [Event("mark quantize begins", 0, 0.0, 0.0, 0.0)], 0.0
        for stretch in stretches:
            actual.append(Event("all_gather", 8, now + stretch, now + stretch + 0.5, 1.0))
            now += stretch + 0.5
        return [*actual, Event("mark quantize ends", 0, now, now, 0.0), Event("barrier", 0, now + 9, now + 9, 0.0)]

    both = [within(of_rank, "quantize") for of_rank in (events(1.0, 4.0), events(3.0, 2.0))]
    assert critical_seconds(both) == 3.0 + 0.5 + 4.0 + 0.5 and critical_seconds(both[:1]) == 6.0
    with pytest.raises(ValueError, match="different collectives"):
        critical_seconds([within(events(1.0), "quantize"), both[0]])


def test_the_command_prints_what_it_planned(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "compress_and_recover", "--shape", "8b", "--link", "25", "--ranks", "1,2", "--device", "cpu", "--dtype", "bfloat16"]
    arguments += [part for setting in (*BRIEF, "quantize.guided=0") for part in ("--set", setting)]  # guided, no rows share a Cholesky
    assert cli.main([*arguments, "--json"]) == 0
    actual = json.loads(capsys.readouterr().out)
    assert [row["ranks"] for row in actual["all_stages"]] == [1, 2] and actual["all_stages"][1]["sent_bytes"] > 0
    serial = {row["stage"]: row["of which"] for row in actual["serial"]}
    assert "one Cholesky" in serial["quantize"] and "writing" in serial["quantize"] and "loading" in serial["quantize"]


def test_a_sum_travels_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitmend.pipelines.planning.division.PIECE", 1000)
    actual = Exchange("gradients", "sum", 2257.0, 4, 11, 2.0)
    assert actual.calls(1) == actual.sent(1) == 0
    assert actual.calls(3) == 2 * 3 * (4 + 1)
    assert actual.sent(3) == 2 * 2 * 4 * sum(4 * (width + 1) + width for width in (334, 334, 86))
    assert exchange.SLOTS == 8


def test_what_lies_in_parts_is_sent_by_all_to_all() -> None:
    actual = Exchange("weights", "parts", 600.0, 4, 5, 2.0)
    assert (actual.calls(3), actual.sent(3)) == (2 * 2, 2 * 2 * 2 * 600 * 4 / 3) and actual.calls(1) == actual.sent(1) == 0
    actual = []
    for shard in ("false", "true"):
        rows = plan_of("8b", *FULL, f"recover.shard={shard}", sizes=(1, 8))[0]["stages"]
        actual.append({row["ranks"]: row for row in rows if row["stage"] == "recover"})
    whole, parted = actual
    assert whole[1]["seconds"] == parted[1]["seconds"] and parted[1]["device_bytes"] == pytest.approx(whole[1]["device_bytes"], rel=1e-3)
    assert parted[8]["device_bytes"] < 0.4 * whole[8]["device_bytes"]


def test_a_search_for_the_rate_counts() -> None:
    """Three tries of 20 steps, each judged, before a run of 200."""
    actual = []
    for rate in ("null", "search"):
        report, made = plan_of("8b", f"recover.learning_rate={rate}", "recover.steps=200", sizes=(1,))
        (seconds,) = [row["seconds"] for row in report["stages"] if row["stage"] == "recover"]
        sent = {exchange.name: exchange.times for exchange in made.needs["recover"][0].sent}
        actual.append((seconds, sent["tokens"], sent["held-out losses"]))
    (plain, steps, judged), (searched, more_steps, more_judged) = actual
    assert (more_steps - steps, more_judged - judged) == (60, 3)
    assert 1.25 * plain < searched < 1.4 * plain


FULL = ("quantize.method=none", "decompose.method=none", "prune.method=none", "recover.method=full", "recover.accumulation=8")
COUNTED = """
import os
import torch
from bitmend.pipelines.bench import process_scaling
from bitmend.pipelines.devices.rates import Speeds
process_scaling.measured = lambda compute, clock: Speeds({{torch.float32: 1.0}}, 1.0, 1.0, 1.0, 1.0, 1.0)
assert process_scaling.main([{recipe!r}, {run!r}, {answer!r} + os.environ["RANK"]]) == 0
"""
TRAINED = {"method": "lora", "rank": 2, "steps": 3, "batch_size": 1, "seq_len": 64, "accumulation": 3, "eval_every": 2, "loss": "cross_entropy"}


BY_MATRIX = [{"quantize": {"method": "gptq", "group_size": 32}}, {"recover": TRAINED}]
BY_BLOCK = [
    {"quantize": {"method": "block_training", "group_size": 32, "steps": 2, "batch_size": 3, "window": "sub_block"}},
    {"recover": {"method": "reconstruct", "train": "lora", "norms": False, "rank": 2, "steps": 3, "batch_size": 3, "samples": 6, "seq_len": 64}},
]


@pytest.mark.parametrize("stages", [BY_MATRIX, pytest.param(BY_BLOCK, marks=pytest.mark.slow)])
def test_collectives_and_their_bytes_are_those_of_the_plan(
    stages: list[dict[str, Any]], commands: Processes, small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    """Of sums to the byte; of objects, which are pickled, within what a pickle adds."""
    recipe = chosen(tmp_path, small_model, small_text, stages, calibration={"samples": 40, "seq_len": 128}, evaluation={"seq_len": 64, "windows": 2})
    (tmp_path / "resolved.yaml").write_text(recipe.to_yaml())
    code = COUNTED.format(recipe=str(tmp_path / "resolved.yaml"), run=str(tmp_path / "run"), answer=str(tmp_path / "answer"))
    assert commands.ranks(2, tmp_path / "log", code=code) == [0, 0], [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    answers = [json.loads((tmp_path / f"answer{rank}").read_text()) for rank in range(2)]
    made = plan.costed(recipe, device="cpu")
    for stage in ("quantize", "recover"):
        events = [within([Event(**event) for event in answer["events"]], stage) for answer in answers]
        exchanges = [exchange for needs in made.needs[stage][:-1] for exchange in needs.sent]
        sums = [exchange for exchange in exchanges if exchange.kind == "sum"]
        handed = [[event.sent for event in of_rank if event.kind == "all_to_all_single"] for of_rank in events]
        assert sum(map(len, handed)) == 2 * sum(x.times * math.ceil(x.units / 2) for x in sums)
        added = sum(x.times * x.itemsize * math.ceil(x.units / 2) * (math.ceil(x.numbers / 2) + 1) for x in sums)
        assert [sum(of_rank) for of_rank in handed] == [added, added] and {x.units for x in sums} == {3}
        counted = [event for event in events[0] if event.kind in ("all_to_all_single", "all_gather", "broadcast")]
        assert len(counted) == sum(exchange.calls(2) for exchange in exchanges), stage
        sent = sum(exchange.sent(2) for exchange in exchanges)
        assert sent < max(sum(event.sent for event in of_rank) for of_rank in events) < 1.35 * sent, stage
        assert 0 < critical_seconds(events) < 60
