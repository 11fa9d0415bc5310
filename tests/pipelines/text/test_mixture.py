"""Several texts: training and calibration on a mixture, evaluation on further ones, and what the model writes itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.demo.texts import TEXTS
from bitmend.pipelines.devices.rates import Speeds
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.models.source import load_config, load_tokenizer
from bitmend.pipelines.models.structure import skeleton
from bitmend.pipelines.planning import run_costs, table_costs
from bitmend.pipelines.planning.plan import predict, refusals
from bitmend.pipelines.recipes.mixture import NAMED, SELF, Share, parse_mixture, with_sources
from bitmend.pipelines.recipes.recipe import Recipe, resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.evaluate import evaluate
from bitmend.pipelines.stages import self_text as writing
from bitmend.pipelines.stages.inputs import Inputs
from bitmend.pipelines.stages.self_text import self_text
from bitmend.pipelines.text.data import schedule

from ..runs import stage_directory, write_recipe
from ..toy import RTN, SECTIONS, STEPS, toy_text

CPU = torch.device("cpu")


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """What a model writes itself is short, in an empty cache."""
    for name, value in (("DOCUMENTS", 8), ("TOKENS", 48), ("AT_ONCE", 4)):
        monkeypatch.setattr(writing, name, value)
    return cache / "text"


def recipe_of(place: Path, model: Path, **options: Any) -> Recipe:
    stages = [RTN, {"recover": {"method": "scales", **STEPS, "loss": "both", "seq_len": 16, "batch_size": 2}}]
    return resolve(str(write_recipe(place / "r.yaml", stages, **SECTIONS)), options={"model": str(model), **options})


# notation


def test_weights_are_read_and_written(tmp_path: Path):
    assert parse_mixture("demo") == (Share("demo", 1.0),)
    assert parse_mixture("wiki=0.5, code.jsonl=0.3,self=0.2") == (Share("wiki", 0.5), Share("code.jsonl", 0.3), Share("self", 0.2))
    assert with_sources("a.txt=0.25,b=0.75", str.upper) == "A.TXT=0.25,B=0.75"
    odd = tmp_path / "x=1,y.txt"
    odd.write_text("a file of that name")
    assert parse_mixture(str(odd)) == (Share(str(odd), 1.0),)


def test_a_folder_of_the_same_name_does_not_hide_a_text(tmp_path: Path, small_model: Path, monkeypatch: pytest.MonkeyPatch):
    """Folders called docs and code are everywhere."""
    monkeypatch.chdir(tmp_path)
    for name in ("docs", "code", "own.txt"):
        (tmp_path / name).mkdir()
    recipe = recipe_of(tmp_path, small_model, data="docs", train="docs=0.5,own.txt=0.3,self=0.2", eval="./docs")
    assert recipe.data.calibration == "docs" and recipe.data.evaluation == str(tmp_path / "docs")
    assert recipe.data.train == f"docs=0.5,{tmp_path / 'own.txt'}=0.3,self=0.2"
    assert set(TEXTS) | {SELF} == NAMED


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("wiki=0.5,news=0.4", "add up to 0.9, not to 1"),
        ("wiki=1.5,news=-0.5", "a weight above 0"),
        ("wiki,news", "expected SOURCE=WEIGHT"),
        ("wiki=half,news=0.5", "expected SOURCE=WEIGHT"),
        ("=0.5,news=0.5", "expected SOURCE=WEIGHT"),
        ("wiki=0.5,wiki=0.5", "'wiki' stands twice"),
        ("wiki=nan,news=0.5", "expected SOURCE=WEIGHT"),
    ],
)
@pytest.mark.parametrize("option", ["train", "calibration"])
def test_weights_that_make_no_mixture_are_refused(small_model: Path, tmp_path: Path, option: str, text: str, complaint: str):
    with pytest.raises(UsageError, match=complaint) as caught:
        recipe_of(tmp_path, small_model, **{option: text})
    assert f"data.{option}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changed", ["data.evaluation=self", "data.evaluation='a=0.5,b=0.5'", "evaluation.also=[self]", "evaluation.also=['x/a.txt', 'y/a.txt']"]
)
def test_evaluation_texts_are_single_and_their_names_differ(small_model: Path, tmp_path: Path, changed: str):
    recipe = str(write_recipe(tmp_path / "r.yaml", [RTN], **SECTIONS))
    with pytest.raises(UsageError, match="that the model did not write|two texts are called 'a.txt'"):
        resolve(recipe, sets=[changed], options={"model": str(small_model)})


def test_paths_within_a_mixture_become_absolute(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    toy_text(tmp_path / "toy.jsonl")
    monkeypatch.chdir(tmp_path)
    made = recipe_of(tmp_path, small_model, train="toy.jsonl=0.5,self=0.5", calibration="toy.jsonl")
    assert made.data.train == f"{tmp_path / 'toy.jsonl'}=0.5,self=0.5" and made.data.calibration == str(tmp_path / "toy.jsonl")
    (tmp_path / "resolved.yaml").write_text(made.to_yaml())
    assert resolve(str(tmp_path / "resolved.yaml")) == made


def test_any_beginning_of_a_schedule_holds_the_weights():
    weights = (0.5, 0.3, 0.2)
    at = schedule(weights)
    drawn = [at(index) for index in (29, *range(29))]
    drawn = [*drawn[1:], drawn[0]]
    for length in range(1, 31):
        for source, weight in enumerate(weights):
            turns = [turn for which, turn in drawn[:length] if which == source]
            assert abs(len(turns) - weight * length) < 1 and turns == list(range(len(turns)))


def test_the_packaged_recipes_round_embeddings_and_head_and_measure_on_other_texts() -> None:
    for name, bits in (("compress_and_recover", 6), ("sparse_compress_and_recover", 8)):
        for model in ("demo", "org/model"):
            quantize = resolve(name, options={"model": model}).stage("quantize")
            assert (quantize.include_embeddings, quantize.embedding_bits, quantize.head_bits) == (True, bits, bits)
        assert resolve(name).evaluation.also == ["news", "code"] and resolve(name, options={"model": "org/model"}).evaluation.also == []
    plain = resolve("compress_and_recover")
    assert [spec.address for spec in plain.stages] == ["quantize", "recover", "fuse"] and set(plain.skipped.values()) == {
        "prune",
        "decompose",
    }
    trained = {text for share in (*parse_mixture(plain.data.train), *parse_mixture(plain.data.calibration)) for text in [share.source]}
    assert SELF in trained and not trained & set(plain.evaluation.also)
    assert resolve("compress_and_recover", options={"model": "org/model"}).data.train == "demo"
    assert resolve("compress_and_recover", options={"data": "wikitext2"}).data.train == "wikitext2"
    sparse = resolve("sparse_compress_and_recover")
    assert [spec.method for spec in sparse.stages] == ["wanda", "gptq", "best", "lora", "bind"]


# mixtures


def test_training_and_calibration_take_every_source_by_its_weight(small_model: Path, small_text: Path, tmp_path: Path):
    toy = toy_text(tmp_path / "toy.jsonl")
    inputs = Inputs(
        recipe_of(
            tmp_path, small_model, data=str(small_text), train=f"{small_text}=0.75,{toy}=0.25", calibration=f"{toy}=0.5,{small_text}=0.5"
        ),
        small_model,
    )
    draw = inputs.training(16, 2)
    assert [draw(index).kind for index in range(8)].count(str(toy)) == 2
    assert torch.equal(draw(5).ids, inputs.training(16, 2)(5).ids) and not any(draw(index).generated for index in range(8))
    held_out = inputs.held_out(16, 2)
    assert {batch.kind for batch in held_out} == {str(small_text), str(toy)}
    words = load_tokenizer(small_model).decode(inputs.calibration()[0])
    assert inputs.calibration().shape == (2, 32) and "near the" in words
    assert "near the" not in load_tokenizer(small_model).decode(inputs.calibration()[1])


def test_a_weight_is_part_of_a_stages_key(small_model: Path, small_text: Path, tmp_path: Path):
    toy = toy_text(tmp_path / "toy.jsonl")

    def keys(weight: float) -> list[Any]:
        recipe = recipe_of(tmp_path, small_model, data=str(small_text), train=f"{small_text}={weight},{toy}={1 - weight}")
        return Inputs(recipe, small_model).fingerprint(recipe.stage("recover"), None)

    assert keys(0.75) == keys(0.75) and keys(0.75) != keys(0.5)


def test_evaluation_text_of_every_name_is_kept_out_of_every_source(small_model: Path, small_text: Path, tmp_path: Path):
    rows = [json.loads(line) for line in small_text.read_text(encoding="utf-8").splitlines()]
    toy, seen = toy_text(tmp_path / "toy.jsonl"), tmp_path / "seen.jsonl"
    seen.write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    recipe = recipe_of(tmp_path, small_model, data=str(toy), train=f"{small_text}=0.5,{toy}=0.5")
    inputs = Inputs(recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"also": (str(seen),)})}), small_model)
    dropped = sum(inputs.parts[part][str(small_text)].protocol["dropped_documents"] for part in ("train", "held_out"))
    assert dropped == 9
    assert {row["text"] for row in rows[:9]}.isdisjoint(d.text for d in inputs.parts["train"][str(small_text)].documents)


# further evaluation texts


@pytest.mark.usefixtures("no_pages")
def test_every_stage_is_measured_on_every_text(small_model: Path, small_text: Path, tmp_path: Path):
    toy = toy_text(tmp_path / "toy.jsonl")
    recipe = str(write_recipe(tmp_path / "r.yaml", [RTN], **SECTIONS))
    options = {"model": str(small_model), "data": str(small_text)}
    alone = runner.run(resolve(recipe, options=options), tmp_path / "run", device="cpu")
    made = runner.run(resolve(recipe, options=options, sets=[f"evaluation.also=['{toy}']"]), tmp_path / "run", device="cpu")
    assert [stage.perplexity for stage in made.stages] == [stage.perplexity for stage in alone.stages]  # and nothing was done again
    assert made.texts["toy.jsonl"].dataset == "toy.jsonl" and not alone.texts
    first, last = (stage.texts["toy.jsonl"] for stage in made.stages)
    assert first.nll_difference is None and first.perplexity_ratio == 1
    assert last.kl_to_baseline > 0 and last.perplexity_ratio == pytest.approx(last.perplexity / first.perplexity)
    seen = evaluate(str(stage_directory(tmp_path / "run", "quantize")), eval_source=str(toy), seq_len=32, windows=4, device="cpu")
    assert last.perplexity == pytest.approx(seen["perplexity"], rel=1e-6) and last.perplexity != pytest.approx(
        made.stages[-1].perplexity, rel=0.1
    )


# what the model writes


def test_the_model_writes_once_and_keeps_it(small_model: Path, little_text: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = load_tokenizer(small_model)
    first = self_text(small_model, tokenizer, 0, CPU)
    assert len(first.documents) == 8 and len({d.text for d in first.documents}) == 8
    monkeypatch.setattr(writing, "_written", lambda *_: pytest.fail("written again"))
    assert self_text(small_model, tokenizer, 0, CPU) == first
    monkeypatch.undo()


def test_what_it_writes_follows_the_seed_alone(small_model: Path, little_text: Path):
    tokenizer = load_tokenizer(small_model)
    first = [d.text for d in self_text(small_model, tokenizer, 0, CPU).documents]
    other = [d.text for d in self_text(small_model, tokenizer, 1, CPU).documents]
    for path in little_text.glob("self-*.jsonl"):
        path.unlink()
    torch.manual_seed(123)
    assert [d.text for d in self_text(small_model, tokenizer, 0, CPU).documents] == first != other


def test_a_text_of_another_model_is_refused(small_model: Path, little_text: Path):
    tokenizer = load_tokenizer(small_model)
    self_text(small_model, tokenizer, 0, CPU)
    (path,) = little_text.glob("self-*.jsonl")
    facts, *rows = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(facts) | {"model": "f" * 64}), *rows]) + "\n")
    with pytest.raises(InputError, match="another model or other settings wrote it .* delete it and run again"):
        self_text(small_model, tokenizer, 0, CPU)
    path.write_text("no json\n")
    with pytest.raises(InputError, match="not a text that this program kept"):
        self_text(small_model, tokenizer, 0, CPU)


def test_without_bos_another_beginning_is_chosen_and_reported(small_model: Path, little_text: Path):
    tokenizer = load_tokenizer(small_model)
    tokenizer.bos_token = None
    assert "at EOS, since the tokenizer has no BOS" in self_text(small_model, tokenizer, 0, CPU).dataset
    tokenizer.eos_token = None
    made = self_text(small_model, tokenizer, 0, CPU)
    assert "with a token drawn from the vocabulary" in made.dataset and len({d.text[:3] for d in made.documents}) > 2


def test_a_dry_run_counts_what_is_yet_to_be_written(
    small_model: Path, small_text: Path, little_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one_a_second = {dtype: 1.0 for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    monkeypatch.setattr(run_costs, "measured", lambda compute: Speeds(one_a_second, *(float("inf"),) * 5))
    seconds = {}
    for train in (str(small_text), f"{small_text}=0.5,self=0.5"):
        recipe = recipe_of(tmp_path, small_model, data=str(small_text), train=train)
        seconds[train] = [row["seconds"] for row in predict(recipe, device="cpu")["stages"]]
    without, with_it = seconds.values()
    weights = sum(p.numel() for p in skeleton(load_config(small_model)).parameters())
    assert with_it[1] - without[1] == pytest.approx(table_costs.DOCUMENTS * table_costs.TOKENS * weights, rel=1e-6)
    assert with_it[2:] == without[2:]
    self_text(small_model, load_tokenizer(small_model), 0, CPU)
    assert [row["seconds"] for row in predict(recipe, device="cpu")["stages"]] == without


@pytest.mark.usefixtures("no_pages")
def test_a_run_trains_on_what_the_model_writes(small_model: Path, small_text: Path, little_text: Path, tmp_path: Path):
    recipe = recipe_of(tmp_path, small_model, data=str(small_text), train=f"{small_text}=0.5,self=0.5")
    draw = Inputs(recipe, small_model).training(16, 2)
    assert [draw(index).generated for index in range(4)] == [False, True, False, True]
    made = runner.run(recipe, tmp_path / "run", device="cpu")
    metrics = made.stages[-1].metrics
    assert metrics["tokens"] == 12 * 2 * 16 and metrics["held_out_loss_kept"] < metrics["held_out_loss_start"]


def test_imitation_needs_whom_to_imitate(small_model: Path, small_text: Path, tmp_path: Path):
    stages = [RTN, {"recover": {"method": "scales", **STEPS, "loss": "cross_entropy"}}]
    recipe = resolve(
        str(write_recipe(tmp_path / "r.yaml", stages, **SECTIONS)),
        options={"model": str(small_model), "train": f"{small_text}=0.5,self=0.5"},
    )
    (line,) = refusals(recipe, small_model)
    assert line.startswith("recover: --train self: what the dense model writes teaches by imitation alone, and loss: cross_entropy")
