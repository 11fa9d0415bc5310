"""Recipes and --set with anything in them: a validated recipe that survives being written and read, or one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from bitmend.pipelines.recipes import recipe as recipes
from bitmend.pipelines.recipes.recipe import resolve, run_directory
from bitmend.pipelines.recipes.stage_settings import STAGES, fields_of, methods
from hypothesis import strategies as st

from .changes import HOSTILE, Files, changed, drawn
from .ending import counts, ending, fuzz

CORPUS = Path(__file__).parents[1] / "corpus"
PLAIN = {
    "model": "demo",
    "stages": [{"prune": {"method": "wanda"}}, {"quantize": {"method": "gptq", "bits": 3}}, {"recover": {"method": "lora"}}],
}
ROOTS = [
    *recipes.FIELDS,
    "profiles",
    *STAGES,
    "quantize.2",
    "prune.1",
    "recover.0",
    "nothing",
    "data.train",
    "calibration.samples",
    "allocation.table",
]
TOKENS = [
    "stages:", "- ", "  ", "\n", "{", "}", "[", "]", ": ", ", ", "&a ", "*a", "!!python/object:os.system ", "!!binary ", "!!set ", "<<: ", "? ", "| ", "> ",
    "'", '"', "#", "---\n", "...", "%YAML 1.1\n", "\t", "quantize", "prune", "method", "gptq", "bits", "3", "0x1F", "1e3", ".inf", "~", "null", "2:4",
    "\x00", "\ufeff", "\x85", "é", "!!float ", "!!int ", "!!timestamp ", "2001-01-01", "!!omap ", "!<x> ", "@", "`", "1_000", "model: ", "seed: ", "data: ",
]  # fmt: skip
VALUES = st.sampled_from([v for v in HOSTILE if v != 10**400]) | st.integers() | st.text(max_size=6)


@st.composite
def structures(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe most of whose names are known, and whose values are anything."""
    actual: dict[str, Any] = {draw(st.sampled_from(ROOTS)): draw(VALUES | sections()) for _ in range(draw(st.integers(0, 2)))}
    return {**PLAIN, **actual} if draw(st.booleans()) else {"stages": draw(st.lists(stages() | VALUES, max_size=3)), **actual}


@st.composite
def sections(draw: st.DrawFn) -> dict[str, Any]:
    keys = st.sampled_from(["samples", "seq_len", "windows", "train", "method", "bits", "table", "demo", "standard", "stages", "quantize"])
    return draw(st.dictionaries(keys, VALUES | st.dictionaries(keys, VALUES, max_size=2), max_size=3))


@st.composite
def stages(draw: st.DrawFn) -> dict[str, Any]:
    stage = draw(st.sampled_from(list(STAGES)))
    method = draw(st.sampled_from(list(methods(stage))))
    names = [row.name for row in fields_of(stage, method)] + ["ignore", "overrides", "include_head", "method"]
    return {stage: {"method": method, **draw(st.dictionaries(st.sampled_from(names), VALUES | sections(), max_size=2))}}


def as_yaml(document: Any) -> str:
    try:
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, UnicodeError):
        return json.dumps(document)


def read(text: str | bytes, place: Path) -> None:
    """Read as `pipeline run FILE` reads it, written as its run directory holds it, and read again."""
    file = place / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    actual = resolve(str(file))
    run_directory(actual)
    written = place / "recipe.resolved.yaml"
    written.write_text(actual.to_yaml(), encoding="utf-8")
    assert resolve(str(written)) == actual


@counts(200, 20_000)
def test_structures(count: int, tmp_path: Path) -> None:
    codes = fuzz(count, count > 1000, structures().map(as_yaml), lambda text: read(text, tmp_path))
    assert codes[2] > 0 and codes[0] > 0


@counts(150, 20_000)
def test_yaml(count: int, tmp_path: Path) -> None:
    text = st.lists(st.sampled_from(TOKENS) | st.text(max_size=3), max_size=14).map("".join)
    files: Files = {"r.yaml": as_yaml(PLAIN).encode()}
    damaged = drawn(files).map(lambda actual: changed(files, actual)["r.yaml"])
    assert fuzz(count, count > 1000, text | damaged, lambda actual: read(actual, tmp_path))[2] > 0


@counts(150, 20_000)
def test_set(count: int, tmp_path: Path) -> None:
    key = st.lists(
        st.sampled_from([*ROOTS, "bits", "method", "1", "", "2", "method.x", "overrides", "q_proj"]) | st.text(max_size=3), max_size=4
    )
    value = st.lists(st.sampled_from(TOKENS) | st.text(max_size=3), max_size=5).map("".join) | VALUES.map(str)
    text = st.tuples(key.map(".".join), st.sampled_from(["=", "=", "=", "", "=="]), value).map("".join)
    assert fuzz(count, count > 1000, st.lists(text, min_size=1, max_size=2), lambda sets: resolve("compress_and_recover", sets=sets))[2] > 0


@pytest.mark.parametrize("file", sorted((CORPUS / "recipes").iterdir()), ids=lambda file: file.name)
def test_corpus_of_recipes(file: Path, tmp_path: Path) -> None:
    assert ending(lambda: read(file.read_bytes(), tmp_path)) == 2


@pytest.mark.parametrize("text", json.loads((CORPUS / "sets.json").read_text()))
def test_corpus_of_sets(text: str) -> None:
    assert ending(lambda: resolve("compress_and_recover", sets=[text])) == 2
