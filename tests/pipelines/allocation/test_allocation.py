"""A budget on the command line: what is chosen, what is stored, what is done again, what is reported before any work, and what is refused."""

import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bitmend.compress.options import Grid, Setting
from bitmend.pipelines import stages
from bitmend.pipelines.allocation import error_tables
from bitmend.pipelines.allocation.choice import Choice, ChosenSetting, choose_settings, exactly, losses, read_choice, resolved
from bitmend.pipelines.allocation.error_tables import ErrorTable
from bitmend.pipelines.allocation.spending import costs, spent
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.models.sizes import apply, dense_sizes, sizes_before
from bitmend.pipelines.models.source import load_config
from bitmend.pipelines.models.structure import inspect, skeleton
from bitmend.pipelines.planning.plan import predict
from bitmend.pipelines.recipes.budget import AllocationSettings, Budget
from bitmend.pipelines.recipes.recipe import Recipe, resolve
from bitmend.pipelines.run import runner
from bitmend.reports.record import RunRecord

from ..runs import Processes, hashes, write_recipe

QUANTIZE: dict[str, Any] = {"quantize": {"method": "rtn", "clip": "none"}}
QERA: dict[str, Any] = {"decompose": {"method": "qera_exact", "rank": 4}}
FEW: dict[str, Any] = {"bits": [2, 3, 4], "group_sizes": [32, 64], "ranks": [0, 2], "factor_bits": 16, "weighting": "relative"}


@pytest.fixture(scope="module")
def budgeted(small_model: Path, small_text: Path) -> Callable[..., Recipe]:
    def make(place: Path, budget: str, chain: list[dict[str, Any]] | None = None, **allocation: Any) -> Recipe:
        path = write_recipe(place / "r.yaml", chain or [QUANTIZE, QERA], allocation=FEW | allocation)
        return resolve(str(path), options={"model": str(small_model), "data": str(small_text), "budget": budget})

    return make


@pytest.fixture(scope="module")
def spent_run(budgeted: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunRecord]:
    """5.0 bits per weight: between the largest setting without a term and the largest of all, so that some matrices get one."""
    place = tmp_path_factory.mktemp("budget")
    return place / "run", runner.run(budgeted(place, "5.0bpw"), place / "run", device="cpu")


def choice_of(run: Path, budget: str | None = None) -> Choice:
    """The only choice of a run, or the only one for a budget."""
    chosen = [read_choice(path) for path in run.glob("allocation/*/choice-*.json")]
    (one,) = [choice for choice in chosen if choice is None or budget in (None, choice.budget)]
    assert one is not None, "a choice in the run directory is damaged"
    return one


def spent_choice(spent_run: tuple[Path, RunRecord]) -> Choice:
    """A test runs other budgets in this run directory, and the others may come after it."""
    return choice_of(spent_run[0], "5.0bpw")


# -- what is stored ----------------------------------------------------------------------------------------------------------------


def test_the_budget_is_kept_and_spent(spent_run: tuple[Path, RunRecord]) -> None:
    run, made = spent_run
    last, chosen = made.stages[-1], spent_choice(spent_run)
    assert last.stage == "decompose" and last.bits_per_weight is not None
    assert 5.0 * 0.985 < last.bits_per_weight <= 5.0
    artifact = runner.last_artifact(run)
    stored = {name: artifact.stored(name) for name in artifact.linears}
    assert {row.name for row in chosen.rows} == set(stored)
    for row in chosen.rows:
        record, setting = stored[row.name], row.setting
        assert record.stored_bits() == setting.stored_bits(*record.shape) == row.bytes * 8
        assert (record.low_rank.rank if record.low_rank is not None else 0) == setting.rank
    assert chosen.stored_bytes == sum(row.bytes for row in chosen.rows)
    assert len({row.setting for row in chosen.rows}) > 2 and len({row.setting.rank for row in chosen.rows}) == 2


def test_predictions_are_reported_with_what_was_measured(spent_run: tuple[Path, RunRecord]) -> None:
    _, made = spent_run
    rows = {row.name: row for row in spent_choice(spent_run).rows}
    for stage, whole in ((made.stages[-2], False), (made.stages[-1], True)):
        assert len(stage.layers) == len(rows) == 28
        for layer in stage.layers:
            row, metrics = rows[layer.name], layer.metrics
            assert metrics["bits"] == row.setting.grid.bits and metrics["group_size"] == row.setting.grid.group_size
            assert metrics["predicted_output_error"] == (row.predicted_error if whole else row.predicted_error_q) ** 2
            assert layer.relative_output_error == pytest.approx(metrics["predicted_output_error"], rel=0.3), "some of the text"
            assert metrics["measured_loss"] == pytest.approx(layer.relative_output_error)  # the weighting is `relative`
    facts = made.stages[-1].metrics["allocation"]
    assert facts["gap"] <= 1e-3 and facts["total_loss"] == pytest.approx(sum(row.predicted_loss for row in rows.values()))
    ranked = [row for row in rows.values() if row.setting.rank]
    left = [note for note in made.stages[-1].notes if "matched by `ignore`" in note]
    assert len(left) == 1 and f" and {27 - len(ranked)} more" in left[0]
    assert ranked and all(row.predicted_loss < row.predicted_loss_q for row in ranked)


@pytest.mark.usefixtures("no_pages")
def test_bytes_of_the_whole_artifact(budgeted: Callable[..., Recipe], tmp_path: Path) -> None:
    """Masks of a prune stage, headers, norms and embeddings are all counted."""
    chain = [{"prune": {"method": "magnitude", "sparsity": 0.3}}, QUANTIZE, QERA]
    made = runner.run(budgeted(tmp_path, "905kB", chain, ranks=[0, 1]), tmp_path / "run", device="cpu")
    assert made.stages[-1].total_bytes is not None and 905e3 * 0.985 < made.stages[-1].total_bytes <= 905e3


def test_costs_are_those_of_the_whole_recipe(budgeted: Callable[..., Recipe], small_model: Path, tmp_path: Path) -> None:
    """Any choice at all: what the budget counts is what the plan of the resolved recipe stores at its end, a group index, the factors that
    recovery gives a matrix without any, and the compressed head included."""
    quantize = {"method": "gptq", "act_order": "full", "include_head": True, "ignore": "v_proj"}
    lora = {"recover": {"method": "lora", "rank": 2, "steps": 1}}
    recipe = budgeted(
        tmp_path, "1MB", [{"prune": {"method": "wanda"}}, {"quantize": quantize}, QERA, lora], factor_bits=[8, 16], ranks=[0, 2, 4]
    )
    stages, model = spent(recipe), skeleton(load_config(small_model))
    dense = dense_sizes(model, inspect(model, include_head=True), 4)
    counted = costs(recipe, stages, dense)
    picked = np.random.default_rng(0).integers(len(counted.settings), size=len(counted.sites))
    rows = [ChosenSetting(site.name, counted.settings[k], 0, 0, 0, 0, 0) for site, k in zip(counted.sites, picked, strict=True)]
    for spec in resolved(recipe, stages, Choice("1MB", "relative", rows, 1, "", 0, 0, 0, 0, 0)):
        apply(spec, dense)
    assert len(counted.sites) == 24 and {row.setting.rank for row in rows} == {0, 2, 4}
    assert counted.bytes_MK[range(24), picked].sum() + counted.rest_bytes == pytest.approx(dense.total_bytes(), abs=1)


@pytest.mark.usefixtures("no_pages")
def test_normal_float_settings(budgeted: Callable[..., Recipe], tmp_path: Path) -> None:
    chain = [{"quantize": {"method": "normal_float", "ignore": "down_proj"}}]
    made = runner.run(budgeted(tmp_path, "3.3bpw", chain, bits=[2, 4], group_sizes=[32, 64]), tmp_path / "run", device="cpu")
    grids = [row.setting.grid for row in choice_of(tmp_path / "run").rows]
    assert len(grids) == 24 and {grid.kind for grid in grids} == {"normal_float"} and {grid.double_quantized for grid in grids} >= {True}
    assert made.stages[-1].bits_per_weight is not None and 3.3 * 0.97 < made.stages[-1].bits_per_weight <= 3.3


@pytest.mark.usefixtures("no_pages")
def test_sparsity_can_be_chosen_as_well(budgeted: Callable[..., Recipe], tmp_path: Path) -> None:
    """At sizes below 2 bits a mask costs more than it gives; above, 2:4 with smaller groups has its place only where it is forced."""
    chain = [{"prune": {"method": "wanda", "sparsity": 0.5, "overrides": {"k_proj": {"pattern": "2:4", "sparsity": 0.5}}}}, QUANTIZE]
    made = runner.run(budgeted(tmp_path, "4bpw", chain, sparsities=["dense", "2:4"]), tmp_path / "run", device="cpu")
    patterns = {row.name: row.setting.grid.pattern for row in choice_of(tmp_path / "run").rows}
    assert {patterns[name] for name in patterns if "k_proj" in name} == {"2:4"}
    assert {patterns[name] for name in patterns if "k_proj" not in name} == {"dense"}
    for layer in made.stages[-1].layers:
        assert layer.sparsity == pytest.approx(0.5 if "k_proj" in layer.name else 0.0)


@pytest.mark.usefixtures("no_pages")
def test_the_table_can_come_from_the_stages_own_iterates(budgeted: Callable[..., Recipe], tmp_path: Path) -> None:
    """As LQ-LoRA does it; a spectrum of W's rounding knows nothing of a Q that is found anew."""
    loftq = {"decompose": {"method": "loftq", "rank": 4, "iterations": 3}}
    few: dict[str, Any] = {"bits": [2, 3], "group_sizes": 64, "ranks": [0, 4]}
    predicted: dict[str, float] = {}
    for errors in ("rounding", "iterates"):
        recipe = budgeted(tmp_path, "4.2bpw", [QUANTIZE, loftq], errors=errors, **few)
        made = runner.run(recipe, tmp_path / errors, device="cpu").stages[-1]
        layers = [layer for layer in made.layers if layer.rank and layer.name.startswith("model.layers.0.self_attn.q")]
        assert layers and layers[0].metrics["measured_loss"] is not None
        predicted[errors] = layers[0].metrics["predicted_output_error"] / layers[0].relative_output_error
    assert predicted["iterates"] == pytest.approx(1, rel=0.02), "the first matrix reads what the table's did"
    assert abs(predicted["rounding"] - 1) > 2 * abs(predicted["iterates"] - 1)


# -- what is done again ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What really works: "block" for each block of a table, and the stages' addresses."""
    done: list[str] = []

    def noted(name: Callable[..., str], plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: (done.append(name(*args)), plain(*args, **options))[1]

    monkeypatch.setattr(error_tables._Walk, "block", noted(lambda *_: "block", error_tables._Walk.block))
    monkeypatch.setattr(stages, "perform", noted(lambda spec, *_: spec.address, stages.perform))
    return done


@pytest.mark.usefixtures("no_pages")
def test_another_budget_reuses_the_table(
    spent_run: tuple[Path, RunRecord], budgeted: Callable[..., Recipe], counted: list[str], tmp_path: Path
) -> None:
    run, first = spent_run
    before = hashes(run)
    again = runner.run(budgeted(tmp_path, "5.0bpw"), run, device="cpu")
    assert counted == [] and again.to_json()["stages"] == first.to_json()["stages"]
    other = runner.run(budgeted(tmp_path, "2.9bpw"), run, device="cpu")
    assert counted == ["quantize"], "no matrix got a term, so there is nothing to decompose"
    assert [stage.stage for stage in other.stages] == ["baseline", "quantize"]
    assert other.stages[-1].bits_per_weight is not None and other.stages[-1].bits_per_weight <= 2.9
    with pytest.raises(UsageError, match="decompose"):
        runner.run(budgeted(tmp_path, "2.9bpw"), run, device="cpu", until_stage="decompose")
    counted.clear()
    runner.resume(run, device="cpu")
    assert counted == [] and before.items() <= hashes(run).items()
    runner.run(budgeted(tmp_path, "5.0bpw", bits=[2, 4]), run, device="cpu", until_stage="baseline")
    assert counted == [] and runner.status(run)["allocation"]["finished_blocks"] == 0
    assert [row["state"] for row in runner.status(run)["stages"]] == ["done", "missing", "missing"]
    runner.run(budgeted(tmp_path, "5.0bpw"), run, device="cpu")
    assert counted == [] and runner.status(run)["allocation"] == {
        "state": "chosen", "finished_blocks": 4, "directory": f"allocation/{next(run.glob('allocation/*')).name}",
    }  # fmt: skip
    (run / "allocation" / "deadbeef").mkdir()
    (run / "allocation" / "deadbeef" / "block-00000.safetensors").write_bytes(b"of other choices")
    assert {"deadbeef"} < set(runner.gc(run)["dropped"]) and len(list(run.glob("allocation/*"))) == 1
    assert hashes(run) == before


def test_killed_while_the_table_is_built(
    commands: Processes,
    budgeted: Callable[..., Recipe],
    spent_run: tuple[Path, RunRecord],
    small_model: Path,
    small_text: Path,
    tmp_path: Path,
) -> None:
    budgeted(tmp_path, "5.0bpw")
    command = ["run", str(tmp_path / "r.yaml"), "--budget", "5.0bpw", "-o", str(tmp_path / "run"), "--device", "cpu"]
    command += ["-m", str(small_model), "--data", str(small_text)]
    for path, step, ending in (("block-00001", 1, signal.SIGKILL), ("block-00002", 1, signal.SIGTERM), ("choice-", 1, signal.SIGKILL)):
        code = commands.run(command, tmp_path / "log", {"signal": ending, "path": path, "step": step})
        assert code in (-signal.SIGKILL, 130), (tmp_path / "log").read_text()
        table = runner.status(tmp_path / "run")["allocation"]
        assert table["state"] == "not chosen yet" and table["finished_blocks"] == {"block-00001": 1, "block-00002": 3, "choice-": 4}[path]
    assert commands.run(command, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert len(hashes(tmp_path / "run")) > 27 and hashes(tmp_path / "run").items() <= hashes(spent_run[0]).items()
    assert choice_of(tmp_path / "run").rows == spent_choice(spent_run).rows


# -- before any work ---------------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_the_range(spent_run: tuple[Path, RunRecord], budgeted: Callable[..., Recipe], tmp_path: Path) -> None:
    fresh = predict(budgeted(tmp_path, "3.5bpw"))
    shown = fresh["allocation"]
    assert shown["table"] == "will be built for 4 of 4 blocks" and shown["matrices"] == 28 and shown["chosen"] is None
    assert float(shown["smallest"].removesuffix("bpw")) < 2.5 < 4.5 < float(shown["largest"].removesuffix("bpw"))
    assert [row["bits_per_weight"] for row in fresh["stages"][1:]] == [3.5, 3.5]
    later = predict(budgeted(tmp_path, "5.0bpw"), spent_run[0])
    assert later["allocation"]["table"] == "is there" and later["allocation"]["chosen"] == spent_choice(spent_run).stored
    assert later["finished"] == ["baseline", "quantize", "decompose"]
    for row, stage in zip(later["stages"], spent_run[1].stages, strict=True):
        assert row["total_bytes"] == pytest.approx(stage.total_bytes, rel=0.01)
        assert stage.bits_per_weight is None or row["bits_per_weight"] == pytest.approx(stage.bits_per_weight, rel=1e-3)


def test_what_a_dry_run_calls_smallest_is_feasible(budgeted: Callable[..., Recipe], tmp_path: Path) -> None:
    for budget in ("3bpw", "800kB"):
        least = predict(budgeted(tmp_path, budget))["allocation"]["smallest"]
        assert predict(budgeted(tmp_path, least))["refusals"] == []


REFUSED: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str]] = {
    "nothing to quantize": ("3bpw", [QERA], {}, r"one quantize stage and the ranks of one decompose stage; this recipe's quantize: none"),
    "two of them": ("3bpw", [QUANTIZE, QUANTIZE], {}, r"this recipe's quantize: quantize, quantize\.2"),
    "a method without bits": ("3bpw", [{"quantize": {"method": "nf4"}}], {}, r"quantize\.method nf4 has no bits to choose; choose one of rtn, gptq"),
    "a term with its own grid": ("3bpw", [QUANTIZE, {"decompose": {"method": "svdquant"}}], {}, r"decompose\.method svdquant has .*; choose one of loftq"),
    "the term first": ("3bpw", [QERA, QUANTIZE], {}, r"decompose stands before quantize; put it after"),
    "too small, in bits": ("1.9bpw", [QUANTIZE], {}, r"--budget 1\.9bpw is infeasible: the smallest .* can store is 2\.\d+bpw"),
    "too small, in bytes": ("600kB", [QUANTIZE], {}, r"--budget 600kB is infeasible: the smallest .* can store is \d\d\d\.\d+kB"),
    "masks that cost a bit": ("3bpw", [{"prune": {"method": "wanda"}}, QUANTIZE], {}, r"smallest .* 3\.\d+bpw .*--set prune\.method=none"),
    "a rank above every matrix": ("3bpw", [QUANTIZE, QERA], {"ranks": [200]}, r"allocation\.ranks: rank 200 is above the smaller dimension"),
    "a rank the method cannot hold": (
        "3bpw", [QUANTIZE, {"decompose": {"method": "srr", "rank": 8, "kept_rank": 4}}], {}, r"decompose cannot have rank 2: kept_rank 4",
    ),
    "groups that divide nothing": ("3bpw", [QUANTIZE], {"group_sizes": 48}, r"q_proj: none of allocation\.group_sizes \[48\] fits: .*128.*48"),
    "overrides beyond the choices": ("3bpw", [{"quantize": {"overrides": {"q_proj": {"bits": 8}}}}], {}, r"q_proj: none of the choices"),
    "iterates of nothing": ("3bpw", [QUANTIZE], {"errors": "iterates"}, r"iterates are those of a decompose stage, and this recipe has none"),
    "sparsity of nothing": ("3bpw", [QUANTIZE], {"sparsities": "2:4"}, r"allocation\.sparsities need one prune stage before quantize"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, budgeted: Callable[..., Recipe], tmp_path: Path) -> None:
    budget, chain, allocation, words = REFUSED[case]
    lines = predict(budgeted(tmp_path, budget, chain, **allocation))["refusals"]
    assert len(lines) == 1 and re.search(words, lines[0]) and lines[0].startswith("--budget"), lines


@pytest.mark.parametrize(("allocation", "words"), [
    ({"bit": 3}, r"allocation: unknown key 'bit'; did you mean 'bits'\?"),
    ({"bits": 7}, r"allocation\.bits"),
    ({"ranks": -1}, r"allocation\.ranks"),
    ({"group_sizes": 0}, r"allocation\.group_sizes: expected a list of -1 or 1 … 65,536, got 0"),
    ({"sparsities": "4:2"}, r"allocation\.sparsities: expected a list of dense, N:M or shares such as 0\.5, got '4:2'"),
    ({"weighting": "perplexity"}, r"allocation\.weighting"),
])  # fmt: skip
def test_settings_that_cannot_be(allocation: dict[str, Any], words: str, budgeted: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        budgeted(tmp_path, "3bpw", **allocation)


def test_every_list_is_reached_from_the_command_line(tmp_path: Path) -> None:
    made = resolve(
        "compress_and_recover", sets=["allocation.bits=[2,4]", "allocation.sparsities=[dense,0.5]", "allocation.ranks=8", "budget=3bpw"]
    )
    assert (made.allocation.bits, made.allocation.sparsities, made.allocation.ranks) == ((2, 4), ("dense", "0.5"), (8,))
    (tmp_path / "again.yaml").write_text(made.to_yaml())
    assert resolve(str(tmp_path / "again.yaml")) == made


# -- the parts ---------------------------------------------------------------------------------------------------------------------


def test_a_budget_above_all_says_so(budgeted: Callable[..., Recipe], spent_run: tuple[Path, RunRecord], tmp_path: Path) -> None:
    recipe = budgeted(tmp_path, "32bpw", [QUANTIZE])
    counted = costs(recipe, spent(recipe), sizes_before(runner.last_artifact(spent_run[0], "baseline")))
    table = ErrorTable(np.random.default_rng(0).random((28, 1, len(counted.settings))), np.ones((28, 1)), 0.0)
    chosen = choose_settings(recipe, spent(recipe), counted, table)
    assert chosen.note is not None and "32bpw is above all that the choices of `allocation` can store (4.723bpw)" in chosen.note
    assert [row.predicted_loss for row in chosen.rows] == table.relative_MVK[:, 0].min(1).tolist()


def test_weightings() -> None:
    relative = np.arange(1.0, 13.0).reshape(3, 2, 2)
    table = ErrorTable(relative, np.array([[10.0, 0.0], [0.0, 2.0], [30.0, 6.0]]), 0.0)
    assert losses(table, "relative").tolist() == relative[:, 0].tolist()
    assert losses(table, "output").tolist() == (relative[:, 0] * [[10], [20], [30]]).tolist(), "no token reached the second: the middle one"
    assert losses(table, "fisher").tolist() == (relative[:, 1] * [[4], [2], [6]]).tolist()


def test_names_are_found_exactly(budgeted: Callable[..., Recipe], tmp_path: Path) -> None:
    """`blocks.1.a` is neither `blocks.11.a` nor `blocksX1.a`; settings that several matrices share are one override."""
    recipe = budgeted(tmp_path, "3bpw", [{"quantize": {"ignore": "head", "overrides": {"b": {"damp": 0.02}}}}, QERA])
    three, four = Grid(bits=3, group_size=64), Grid(bits=4, group_size=64)
    given = {"blocks.1.a": Setting(three), "blocks.11.a": Setting(four, 2, 8), "blocks.2.b": Setting(three)}
    chosen = Choice("3bpw", "relative", [ChosenSetting(n, s, 1, 1, 1, 1, 1) for n, s in given.items()], 1, "3bpw", 1, 1, 0, 0, 0)
    quantize, decompose = resolved(recipe, spent(recipe), chosen)
    assert [quantize.config_for(name).bits for name in (*given, "blocksX1.a")] == [3, 4, 3, 4]
    assert quantize.config_for("blocks.2.b").damp == 0.02 and len(quantize.overrides) == 3
    assert [decompose.skips(name) for name in given] == [True, False, True] and not decompose.skips("other")
    assert (decompose.config_for("blocks.11.a").rank, decompose.config_for("blocks.11.a").factor_bits) == (2, 8)
    assert re.search(exactly(["a.b", "a+"]), "a+") and not re.search(exactly(["a.b"]), "aXb") and not re.search(exactly(["a.b"]), "a.bc")


@pytest.mark.parametrize(
    ("text", "stored", "shown"), [("3bpw", 1000, "2.667bpw"), ("1MB", 123_456, "0.624MB"), ("1KiB", 1024, "489.282KiB")]
)
def test_a_size_in_the_unit_of_the_budget_is_rounded_up(text: str, stored: float, shown: str) -> None:
    budget = Budget.parse(text)
    assert budget is not None and budget.text_of(stored, 3000, 500_000) == shown
    enough = Budget.parse(shown)
    assert enough is not None and enough.bytes_for(3000, 500_000) >= stored


def test_defaults_express_the_tables_of_the_papers() -> None:
    assert AllocationSettings().weighting == "fisher" and AllocationSettings().sparsities == ()
    assert len(AllocationSettings(bits=3).bits) == 1
