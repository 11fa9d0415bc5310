"""The file that `list` and `show` read says what the registries say."""

import json
import re
from pathlib import Path

import pytest
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.recipes import catalog
from bitmend.pipelines.recipes.recipe import known_recipes, resolve
from bitmend.pipelines.recipes.stage_settings import STAGES, methods


def test_the_file_is_what_the_registries_say() -> None:
    now = json.loads(json.dumps(catalog.described()))
    assert now == catalog.catalog(), "write it anew: python -m bitmend.pipelines.recipes.catalog"
    assert list(now["methods"]) == list(STAGES) and all(list(now["methods"][stage]) == list(methods(stage)) for stage in STAGES)


def test_every_method_says_what_it_does_and_names_its_paper_by_its_number() -> None:
    for stage, rows in catalog.catalog()["methods"].items():
        for name, row in rows.items():
            assert 0 < len(row["does"]) <= 76 and "\n" not in row["does"], (stage, name)
            assert re.fullmatch(r"|([\w-]+, )?arXiv:\d{4}\.\d{5}", row["paper"]), (stage, name)


@pytest.mark.parametrize("recipe", known_recipes())
@pytest.mark.parametrize("profile", [None, "demo", "standard"])
@pytest.mark.parametrize("model", [None, "demo", "org/model", "here"])
def test_a_packaged_recipe_is_shown_as_it_is_resolved(
    recipe: str, profile: str | None, model: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    resolved = resolve(recipe, options={"model": model, "profile": profile}).settings()
    shown = catalog.packaged(recipe, model, profile)
    assert shown == resolved and list(shown) == list(resolved)


def test_what_is_not_packaged_is_left_to_resolve() -> None:
    assert catalog.packaged("mine.yaml", None, None) is None and catalog.packaged("recover", "", None) is None
    with pytest.raises(UsageError, match="did you mean 'wanda'"):
        catalog.named("wnada")


def test_text_is_json_with_lines_that_fit() -> None:
    value = {"a": [1, 2, {"b": "x" * 60, "c": ["y" * 60, "z" * 60, None]}], "d": {}, "e": "·" * 200}
    lines = catalog.text(value).splitlines()
    assert json.loads("\n".join(lines)) == value and len(lines) > 5
    assert [line for line in lines if len(line) > catalog.LINE + 3] == [line for line in lines if "·" in line]
