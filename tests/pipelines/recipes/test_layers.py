"""Layers of a recipe before any validation: how the command line becomes a document, which layer wins, which settings turn soft."""

import pytest
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.recipes.layers import COMMAND_LINE, Draft, command_line, document_of
from bitmend.pipelines.recipes.recipe import resolve

FIELDS = ("name", "model", "profile", "data", "seed", "allocation", "stages")
LIST = {"seed": 1, "stages": [{"quantize": {"method": "gptq", "bits": 3}}, "fuse", {"quantize": {"method": "rtn"}}]}


def test_the_command_line_is_a_document() -> None:
    options = {"seed": 3, "model": None, "data": "wiki", "eval": "news"}
    made = command_line(["quantize.bits=4", "quantize.2.bits=2", "quantize.1.group_size=32", "allocation.ranks=[0, 8]"], options)
    assert made == {
        "seed": 3,
        "data": {"calibration": "wiki", "train": "wiki", "evaluation": "news"},
        "quantize": {"bits": 4, "group_size": 32},
        "quantize.2": {"bits": 2},
        "allocation": {"ranks": [0, 8]},
    }
    assert command_line(["data=code"], {})["data"] == {"calibration": "code", "train": "code", "evaluation": "code"}


def test_the_upper_layer_wins_and_settings_of_another_method_turn_soft() -> None:
    draft = Draft({"seed": 0, "name": "mine"}, FIELDS)
    draft.lay(LIST, "recipe")
    draft.lay({"seed": 2, "quantize": {"method": "nf4"}, "quantize.2": {"bits": 8}}, COMMAND_LINE)
    assert draft.fields == {"seed": 2, "name": "mine"}
    assert [stage.address for stage in draft.stages] == ["quantize", "fuse", "quantize.2"]
    first, _, second = draft.stages
    assert first.keys == {"method": "nf4", "bits": 3} and "bits" in first.soft and not first.named
    assert second.keys == {"method": "rtn", "bits": 8} and not second.soft and second.named == {"bits"}


def test_documents_are_checked_by_key() -> None:
    assert document_of({"data": "wiki"}, "here", FIELDS)["data"] == {"calibration": "wiki", "train": "wiki", "evaluation": "wiki"}
    for document, inner, expected in (
        ({"sed": 1}, False, "sed"),
        ({"profiles": {"demmo": {}}}, False, "demmo"),
        ({"model": "demo"}, True, "model"),
        ({"profiles": 3}, False, "here: profiles: expected `key: value` settings, got 3"),
    ):
        with pytest.raises(UsageError, match=expected):
            document_of(document, "here", FIELDS, inner)


def test_a_stage_that_the_recipe_lacks_is_named_with_those_it_has() -> None:
    draft = Draft({}, FIELDS)
    draft.lay(LIST, "recipe")
    with pytest.raises(UsageError, match="--set: the recipe has no stage 'recover'; its stages are: quantize, fuse, quantize.2"):
        draft.lay({"recover": {"steps": 1}}, "--set")


def test_an_order_that_was_meant_for_another_method_is_dropped_for_one_without() -> None:
    """The recipe's `true_sequential` goes with its method; asked for by hand it is refused."""
    method = ["quantize.method=learned_rounding"]
    chosen = resolve("compress_and_recover", sets=method)
    (spec,) = [stage for stage in chosen.stages if stage.name == "quantize"]
    assert not spec.true_sequential
    with pytest.raises(UsageError, match=r"quantize\.true_sequential: learned_rounding trains a block as a whole"):
        resolve("compress_and_recover", sets=[*method, "quantize.true_sequential=true"])
