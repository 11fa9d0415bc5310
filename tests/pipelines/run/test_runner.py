"""The runner: what is done again and what is not, who may be where, what is kept."""

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines import stages
from bitmend.pipelines.devices.compute import Compute
from bitmend.pipelines.errors import InputError, QualityError, UsageError
from bitmend.pipelines.export.exporting import export
from bitmend.pipelines.recipes.recipe import Recipe, resolve
from bitmend.pipelines.run import runner, sweep
from bitmend.pipelines.run.evaluate import evaluate
from bitmend.pipelines.store.files import read_json, write_json

from ..runs import CHAIN, chosen, hashes, stage_directory, write_recipe

HERE = Compute(torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("no_pages")

ADDRESSES = ["baseline", "prune", "quantize", "decompose", "recover", "fuse"]


@pytest.fixture
def mine(finished: Path, tmp_path: Path) -> Path:
    """A finished run that a test may change."""
    shutil.copytree(finished, tmp_path / "run", copy_function=_linked)
    return tmp_path / "run"


def _linked(source: str, target: str) -> None:
    if source.endswith(".safetensors"):
        Path(target).hardlink_to(source)
    else:
        shutil.copy2(source, target)


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses of the stages that really work."""
    done: list[str] = []

    def perform(spec: Any, *rest: Any) -> Any:
        done.append(spec.address)
        return plain(spec, *rest)

    plain = stages.perform
    monkeypatch.setattr(stages, "perform", perform)
    return done


def recipe_with(place: Path, model: Path, text: Path, **changes: Any) -> Recipe:
    """CHAIN with `stage__key=value` changed."""
    chain = copy.deepcopy(CHAIN)
    for name, value in changes.items():
        stage, _, key = name.partition("__")
        next(s for s in chain if stage in s)[stage][key] = value
    return chosen(place, model, text, chain)


def test_the_same_command_again_does_nothing(mine: Path, performed: list[str], small_model: Path, small_text: Path, tmp_path: Path) -> None:
    before, record = hashes(mine), (mine / "record.json").read_bytes()
    made = runner.run(chosen(tmp_path, small_model, small_text), mine)
    assert performed == [] and hashes(mine) == before
    assert [s.stage for s in made.stages] == ADDRESSES
    assert {**json.loads(record), "run": ""} == {**json.loads((mine / "record.json").read_text()), "run": ""}


def test_resume_takes_the_recipe_it_was_started_with(mine: Path, performed: list[str]) -> None:
    shutil.rmtree(stage_directory(mine, "fuse"))
    runner.resume(mine)
    assert performed == ["fuse"]
    assert runner.status(mine)["stages"][-1]["state"] == "done"


def test_a_changed_setting_redoes_that_stage_and_those_after_it(
    mine: Path, performed: list[str], small_model: Path, small_text: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = hashes(mine)
    with caplog.at_level(logging.INFO, "bitmend"):
        runner.run(recipe_with(tmp_path, small_model, small_text, decompose__rank=2), mine, until_stage="decompose")
    assert performed == ["decompose"]
    assert "decompose: rank 4 → 2; it is done again" in caplog.text
    assert "recover: a stage before it, its data or the program changed; it is done again" in caplog.text
    assert "quantize: finished before" in caplog.text
    assert before.items() <= hashes(mine).items(), "nothing is overwritten"
    performed.clear()
    runner.run(chosen(tmp_path, small_model, small_text), mine)
    assert performed == [], "and the old setting finds its old results"


@pytest.mark.parametrize(
    ("change", "first"),
    [({"prune__method": "magnitude"}, "prune"), ({"quantize__bits": 4}, "quantize"), ({"recover__steps": 3}, "recover"), ({"seed": 1}, "prune")],
)  # fmt: skip
def test_keys_follow_what_decides_the_result(
    change: dict[str, Any], first: str, small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    def keys(recipe: Recipe) -> list[str]:
        return [s.key for s in runner.plan_steps(recipe, small_model, runner.Inputs(recipe, small_model), HERE)]

    seed = {"seed": change.pop("seed")} if "seed" in change else {}
    base = chosen(tmp_path, small_model, small_text)
    other = recipe_with(tmp_path, small_model, small_text, **change).model_copy(update=seed)
    same = [a == b for a, b in zip(keys(base), keys(other), strict=True)]
    assert same == [address in ADDRESSES[: ADDRESSES.index(first)] for address in ADDRESSES]
    evaluation = base.evaluation.model_copy(update={"windows": 3})
    assert keys(base.model_copy(update={"evaluation": evaluation})) == keys(base), "how it is measured is no part of a result"


def test_other_calibration_text_redoes_what_reads_it(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    def keys(recipe: Recipe) -> list[str]:
        return [s.key for s in runner.plan_steps(recipe, small_model, runner.Inputs(recipe, small_model), HERE)]

    chain = [
        {"quantize": {"method": "rtn", "bits": 4, "group_size": 32, "clip": "power"}},
        {"quantize": {"method": "gptq", "group_size": 32}},
    ]
    base = chosen(tmp_path, small_model, small_text, chain)
    less = base.model_copy(update={"calibration": base.calibration.model_copy(update={"samples": 2})})
    assert [a == b for a, b in zip(keys(base), keys(less), strict=True)] == [True, True, False]


def test_force_does_it_again_to_the_same_bits(
    mine: Path, performed: list[str], small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    before = hashes(mine)
    inode = (stage_directory(mine, "decompose") / "artifact.json").stat().st_ino
    runner.run(chosen(tmp_path, small_model, small_text), mine, force="decompose")
    assert performed == ["decompose", "recover", "fuse"]
    assert hashes(mine) == before
    assert (stage_directory(mine, "decompose") / "artifact.json").stat().st_ino != inode
    assert not list(mine.glob("stages/*.removed"))


def test_until_and_from(performed: list[str], small_model: Path, small_text: Path, tmp_path: Path) -> None:
    recipe = chosen(tmp_path, small_model, small_text)
    made = runner.run(recipe, tmp_path / "run", until_stage="prune")
    assert performed == ["prune"] and [s.stage for s in made.stages] == ["baseline", "prune"]
    with pytest.raises(UsageError, match="--from decompose: quantize is not finished with these settings"):
        runner.run(recipe, tmp_path / "run", from_stage="decompose")
    runner.run(recipe, tmp_path / "run", from_stage="quantize", until_stage="quantize")
    assert performed == ["prune", "quantize"]
    unknown: list[dict[str, Any]] = [{option: "melt"} for option in ("from_stage", "until_stage", "force")]
    for options in unknown:
        with pytest.raises(UsageError, match="unknown stage"):
            runner.run(recipe, tmp_path / "run", **options)


def test_another_protocol_measures_again_and_compresses_nothing(
    mine: Path, performed: list[str], small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    def places() -> dict[str, tuple[int, int]]:
        actual = [p for p in mine.glob("stages/0*/*") if not p.parent.name.endswith(".metrics")]
        return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in actual}

    before, first = places(), runner.record(mine)
    recipe = chosen(tmp_path, small_model, small_text, evaluation={"seq_len": 32, "windows": 5})
    again = runner.run(recipe, mine)
    assert performed == [] and places() == before
    assert (again.protocol.seq_len, again.protocol.windows) == (32, 5)
    assert all(a.perplexity != b.perplexity for a, b in zip(first.stages, again.stages, strict=True))
    assert [s.total_bytes for s in first.stages] == [s.total_bytes for s in again.stages]
    for step in runner.status(mine)["stages"]:
        assert len(list((mine / f"{step['directory']}.metrics").glob("????????.json"))) == 2, "the first numbers are kept"


def test_a_lost_number_is_measured_again(mine: Path, performed: list[str], small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """Even the baseline's hidden states, torn: KL of later stages needs them."""
    first = runner.record(mine)
    hidden = next(mine.glob("stages/00-*.metrics/*.hidden.safetensors"))
    hidden.write_bytes(hidden.read_bytes()[:1000])
    next(mine.glob("stages/02-*.metrics/????????.json")).unlink()
    again = runner.run(chosen(tmp_path, small_model, small_text), mine)
    assert performed == []
    for a, b in zip(first.stages, again.stages, strict=True):
        assert (a.perplexity, a.kl_to_baseline, a.top1_agreement) == (b.perplexity, b.kl_to_baseline, b.top1_agreement)


def test_status_says_what_is_done(finished: Path) -> None:
    actual = json.loads(json.dumps(runner.status(finished)))
    assert [row["stage"] for row in actual["stages"]] == ADDRESSES
    assert {row["state"] for row in actual["stages"]} == {"done"}
    record = {s.stage: s.perplexity for s in runner.record(finished).stages}
    assert {row["stage"]: row["perplexity"] for row in actual["stages"]} == record
    assert all((finished / row["directory"]).is_dir() for row in actual["stages"])


def test_gc_keeps_what_the_plan_names(mine: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    kept = hashes(mine)
    runner.run(recipe_with(tmp_path, small_model, small_text, quantize__bits=4), mine, until_stage="quantize")
    runner.run(chosen(tmp_path, small_model, small_text), mine)
    other = next(p for p in mine.glob("stages/02-*[0-9a-f]") if p != stage_directory(mine, "quantize") and p.suffix == "")
    (mine / "stages" / "02-quantize-aaaaaaaa.partial").mkdir()
    (stage_directory(mine, "quantize").with_suffix(".metrics") / ".abc.json.12345").write_bytes(b"torn")
    actual = runner.gc(mine)
    assert {other.name, f"{other.name}.metrics", "02-quantize-aaaaaaaa.partial", ".abc.json.12345"} <= set(actual["dropped"])
    assert actual["freed_bytes"] > 100_000
    assert hashes(mine) == kept
    runner.resume(mine)


def test_gc_keeps_the_points_of_a_sweep_and_the_run_that_was_swept(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    run, file = tmp_path / "run", write_recipe(tmp_path / "recipe.yaml", [{"quantize": {"method": "rtn", "bits": 8}}])
    options = {"model": str(small_model), "data": str(small_text)}
    runner.run(resolve(str(file), options=options), run, device="cpu")
    sweep.sweep(sweep.combinations(str(file), ["quantize.bits=3,4"], options=options), run, device="cpu")
    before = hashes(run)
    assert len({name.split("/")[1] for name in before}) == 4, "the baseline, the run's own stage, two points"
    assert runner.gc(run)["dropped"] == [] and hashes(run) == before
    runner.run(resolve(str(file), sets=["quantize.bits=2"], options=options), run, device="cpu")
    runner.resume(run)
    assert runner.gc(run)["dropped"] == [] and before.items() <= hashes(run).items()


def test_gc_drops_only_what_it_would_have_named_so_and_nothing_when_it_only_lists(mine: Path) -> None:
    (mine / "stages" / "01-quantize-aaaaaaaa").mkdir()
    (mine / "stages" / "thesis").mkdir()
    (mine / "stages" / "thesis" / "chapter.txt").write_text("irreplaceable")
    (mine / "stages" / "02-quantize-bbbbbbbb").symlink_to(mine.parent)
    listed = runner.gc(mine, dry_run=True)
    assert listed["dropped"] == ["01-quantize-aaaaaaaa", "teacher-states"] and set(listed["left"]) == {"thesis", "02-quantize-bbbbbbbb"}
    assert (mine / "stages" / "01-quantize-aaaaaaaa").is_dir()
    assert runner.gc(mine) == listed
    assert not (mine / "stages" / "01-quantize-aaaaaaaa").exists()
    assert (mine / "stages" / "thesis" / "chapter.txt").read_text() == "irreplaceable" and mine.parent.is_dir()


def test_no_output_lies_inside_a_run(mine: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    before = hashes(mine)
    with pytest.raises(UsageError, match="lies in the run directory"):
        runner.run(chosen(tmp_path, small_model, small_text), mine / "stages" / "inner")
    (tmp_path / "link").symlink_to(mine / "stages")
    for place in (mine / "stages" / "x", mine, tmp_path / "link" / "x"):
        with pytest.raises(UsageError, match="lies in the run directory"):
            export(mine, "dense", place)
    assert hashes(mine) == before and not (mine / "stages" / "inner").exists()


@pytest.mark.parametrize("what", ["eval", "eval of a stage", "export", "status"])
def test_a_flipped_bit_is_found_by_whatever_reads(what: str, mine: Path, tmp_path: Path) -> None:
    stage = runner.last_artifact(mine).directory
    file = max(stage.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[-5] ^= 16
    file.unlink()
    file.write_bytes(bytes(data))
    read = {
        "eval": lambda: evaluate(str(mine), windows=1),
        "eval of a stage": lambda: evaluate(str(stage), windows=1),
        "export": lambda: export(mine, "dense", tmp_path / "out"),
        "status": lambda: runner.status(mine, verify=True),
    }
    with pytest.raises(InputError, match=rf"{file.name}: sha256 is"):
        read[what]()
    assert not (tmp_path / "out").exists()


def test_the_gate_keeps_everything(mine: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    before = hashes(mine)
    with pytest.raises(QualityError, match=r"fuse: perplexity .* above --max-perplexity-ratio 1\.001; the artifacts are kept") as caught:
        runner.run(chosen(tmp_path, small_model, small_text), mine, max_perplexity_ratio=1.001)
    assert caught.value.exit_code == 4 and hashes(mine) == before
    runner.run(chosen(tmp_path, small_model, small_text), mine, max_perplexity_ratio=2.0)


def test_sizes_are_the_files_sizes(finished: Path) -> None:
    for stage in runner.record(finished).stages:
        artifact = runner.last_artifact(finished, stage.stage)
        assert stage.total_bytes == sum(p.stat().st_size for p in artifact.weights.glob("*.safetensors"))
        if not artifact.linears:
            assert stage.bits_per_weight is None and stage.sparsity is None
            continue
        bits = weights = 0
        for name in artifact.linears:
            tensors = artifact.tensors(f"{name}.")
            bits += 8 * sum(t.numel() * t.element_size() for t in tensors.values())
            weights += artifact.stored(name).shape[0] * artifact.stored(name).shape[1]
        assert stage.bits_per_weight == pytest.approx(bits / weights)
        assert {layer.name for layer in stage.layers} == set(artifact.linears)


def test_recovery_adds_no_tensor_it_was_not_asked_for(finished: Path) -> None:
    decompose, recover = (runner.last_artifact(finished, name) for name in ("decompose", "recover"))
    assert set(recover.index) == set(decompose.index)
    assert recover.total_bytes() == decompose.total_bytes()
    for name in decompose.index:
        assert decompose.tensor(name).dtype == recover.tensor(name).dtype, name
    changed = {n.rpartition(".low_rank.")[2] for n in decompose.index if not decompose.tensor(n).equal(recover.tensor(n))}
    assert changed == {"up", "down"}, "LoRA trains the factors and nothing else"


def test_masks_and_codes_survive_the_chain(finished: Path) -> None:
    prune, *after = (runner.last_artifact(finished, name) for name in ("prune", "quantize", "decompose", "recover", "fuse"))
    for name in prune.linears:
        mask = prune.stored(name).mask
        assert mask is not None
        for artifact in after:
            actual = artifact.stored(name)
            assert actual.mask is not None and actual.mask.equal(mask)
        assert after[0].tensor(f"{name}.base.codes").equal(after[-1].tensor(f"{name}.base.codes"))


def test_an_artifact_of_another_key_is_refused(mine: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    place = stage_directory(mine, "prune")
    manifest = read_json(place / "artifact.json")
    write_json(place / "artifact.json", {**manifest, "key": "0" * 64})
    with pytest.raises(InputError, match="its key is 00000000, expected"):
        runner.run(chosen(tmp_path, small_model, small_text), mine)


def test_a_damaged_stage_is_named_and_mended_by_what_the_line_says(
    mine: Path, performed: list[str], small_model: Path, small_text: Path, tmp_path: Path
) -> None:
    before, place = hashes(mine), stage_directory(mine, "recover")
    shard = place / "block-00001.vectors.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"sha256 is .* delete .* and run again"):
        runner.run(chosen(tmp_path, small_model, small_text), mine)
    shutil.rmtree(place)
    runner.run(chosen(tmp_path, small_model, small_text), mine)
    assert performed == ["recover"] and hashes(mine) == before


def test_a_stage_that_appears_twice(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    chain = [{"prune": {"method": "magnitude", "sparsity": 0.2}}, {"quantize": {"method": "rtn", "bits": 8, "group_size": 32}}]
    path = write_recipe(tmp_path / "r.yaml", [chain[0], {"prune": {"method": "none"}}, chain[1], chain[1]])
    options = {"model": str(small_model), "data": str(small_text)}
    recipe = resolve(str(path), sets=["quantize.2.bits=4"], options=options)
    made = runner.run(recipe, tmp_path / "run")
    assert [s.stage for s in made.stages] == ["baseline", "prune", "quantize", "quantize.2"]
    bits = [runner.last_artifact(tmp_path / "run", a).linears for a in ("quantize", "quantize.2")]
    assert [next(iter(actual.values()))["base"]["bits"] for actual in bits] == [8, 4]
    assert runner.last_artifact(tmp_path / "run").manifest["stage"]["name"] == "quantize.2"
    with pytest.raises(InputError, match="has no stage 'melt'"):
        runner.last_artifact(tmp_path / "run", "melt")
