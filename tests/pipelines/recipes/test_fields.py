"""Every field of every method's config: outside the range that its type declares it is refused, inside it builds."""

import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from bitmend.pipelines import cli
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.recipes import fields, recipe, sections
from bitmend.pipelines.recipes.budget import AllocationSettings
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.recipes.stage_settings import STAGES, StageSpec, fields_of, methods
from hypothesis import given, settings
from hypothesis import strategies as st

from ..drawn import WRONG, between, ends, every_field, required_settings, takes
from ..runs import write_recipe

FIELDS = list(every_field())
METHODS = [(stage, method) for stage in STAGES for method in methods(stage)]


def refused(document: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(document)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("stage", "method"), METHODS)
def test_outside_its_range_every_field_is_refused_by_name_value_and_range(stage: str, method: str) -> None:
    tried = 0
    for _, _, field, hint in (row for row in FIELDS if row[:2] == (stage, method)):
        for value in (value for value in WRONG if not takes(hint, value)):
            line, tried = refused({"stages": [{stage: {"method": method, field: value}}]}), tried + 1
            wrong = next((v for v in value.values() if v in (0, 1, 5) or v is True), None) if isinstance(value, dict) else value
            assert re.match(rf"{stage}\.{field}\b.*(expected|is missing|unknown setting 'more')", line), line
            assert "missing" in line or "unknown" in line or fields.shown(wrong) in line or fields.shown(value) in line, line
    print(f"{stage} {method}: {tried} values outside")
    assert tried > 20


@pytest.mark.parametrize(("stage", "method"), METHODS)
@settings(derandomize=True, max_examples=40, deadline=None)
@given(data=st.data())
def test_inside_it_builds(stage: str, method: str, data: st.DataObject) -> None:
    _, _, field, hint = data.draw(st.sampled_from([row for row in FIELDS if row[:2] == (stage, method)]))
    value = data.draw(between(hint))
    written = resolve({"stages": [{stage: {"method": method, **required_settings(stage, method, field, value), field: value}}]}).stages[0]
    assert fields.plain(written.config)[field] == value or isinstance(value, dict)


@pytest.mark.parametrize(("stage", "method"), METHODS)
def test_both_ends_build_and_the_default_lies_inside(stage: str, method: str) -> None:
    rows = {row.name: row for row in fields_of(stage, method)}
    for _, _, field, hint in (row for row in FIELDS if row[:2] == (stage, method)):
        assert takes(hint, rows[field].default), f"{method}.{field}: its default {rows[field].default!r} lies outside {rows[field].range}"
        for value in ends(hint):
            assert resolve({"stages": [{stage: {"method": method, **required_settings(stage, method, field, value), field: value}}]}).stages
    assert list(rows) == list(dict.fromkeys([*(r[2] for r in FIELDS if r[:2] == (stage, method)), *STAGES[stage][3]]))


def test_a_field_without_a_range_is_named() -> None:
    from dataclasses import make_dataclass

    for kind in (int, float, str, int | None, tuple[int, ...]):
        with pytest.raises(TypeError, match="declares no range"):
            fields.field_ranges(make_dataclass("Bare", [("bare", kind, 1)]), {})


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_a_lean_outside_of_its_range_is_refused(value: float) -> None:
    line = refused({"stages": [{"quantize": {"method": "gptq", "refit": value}}]})
    assert line == f"quantize.refit: expected [0, 1] or null, got {value}"


SECTIONS: dict[str, type] = {
    "": recipe.Recipe,
    "calibration": sections.Calibration,
    "evaluation": sections.Evaluation,
    "data": sections.Data,
}
WORDS: tuple[Any, ...] = ("model", "revision", "teacher", "name", "about", "calibration", "train", "evaluation")
ELSEWHERE = {"data", "calibration", "evaluation", "allocation", "stages", "skipped", "profile"}


@pytest.mark.parametrize("section", SECTIONS)
def test_what_is_no_stage(section: str) -> None:
    """Fields of text take every text but the empty one; the others what their types say."""
    tried = 0
    for field, hint in get_type_hints(SECTIONS[section], include_extras=True).items():
        if field in ("model_config", "also", "tasks") or (section == "" and field in ELSEWHERE):  # lists of texts, in test_mixture, test_tasks
            continue
        for value in WRONG:
            inside = (
                isinstance(value, str) and (value != "" or field == "about") if field in WORDS else field != "budget" and takes(hint, value)
            )
            if inside or (value is None and field in ("revision", "teacher", "budget")) or (field == "name" and value == "("):
                continue
            document = {field: value} if section == "" else {section: {field: value}}
            line, tried = refused({"stages": [{"quantize": {}}], **document}), tried + 1
            assert line.startswith(f"{section}.{field}: expected".removeprefix(".")) and fields.shown(value) in line, line
    assert tried > 40


@pytest.mark.parametrize("field", AllocationSettings.model_fields)
def test_allocations(field: str) -> None:
    """One value is a list of one, a share may be written as a number."""
    hint = get_type_hints(AllocationSettings, include_extras=True)[field]
    outside = [v for v in WRONG if not takes(hint, v) and not takes(hint, [v])]
    for value in outside:
        line = refused({"stages": [{"quantize": {}}], "budget": "3bpw", "allocation": {field: value}})
        assert line.startswith(f"allocation.{field}: expected"), line
    assert len(outside) > 20


@pytest.mark.parametrize("field", ["ignore", "include_head", "true_sequential", "overrides", "include_embeddings", "embedding_bits"])
def test_what_the_methods_of_a_stage_share(field: str) -> None:
    hint = get_type_hints(StageSpec, include_extras=True)[field]
    for value in WRONG:
        mapping = isinstance(value, dict) and field == "overrides"
        text = isinstance(value, str) and value not in ("", "(") and field == "ignore"
        if (
            mapping
            or text
            or (field == "ignore" and value == [])
            or (field in ("include_head", "true_sequential", "include_embeddings", "embedding_bits") and takes(hint, value))
        ):
            continue
        line = refused({"stages": [{"quantize": {field: value}}]})
        assert line.startswith(f"quantize.{field}: expected"), line


@pytest.mark.parametrize("budget", ["1e300bpw", "9" * 400 + "GB", "-1bpw", "nanbpw", "0MB", ".MB"])
def test_budgets_beyond_numbers(budget: str) -> None:
    assert refused({"stages": [{"quantize": {}}], "budget": budget}).startswith("budget: expected bits per weight or bytes")


@pytest.mark.parametrize("dry", [True, False])
def test_from_the_command_line_before_a_model_is_opened(dry: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is not there, which would be exit 3: the settings come first."""
    sample = [row for row in FIELDS[:: len(FIELDS) // 30]]
    for number, (stage, method, field, hint) in enumerate(sample):
        wrong = [value for value in WRONG if not takes(hint, value)]
        value = wrong[number % len(wrong)]
        path = write_recipe(tmp_path / "r.yaml", [{stage: {"method": method, field: value}}])
        arguments = ["run", str(path), "-m", str(tmp_path / "absent"), "-o", str(tmp_path / "run"), *(["--dry-run"] if dry else [])]
        assert cli.main(arguments) == 2
        printed = capsys.readouterr()
        (line,) = printed.err.splitlines()
        assert line.startswith(f"error: {stage}.{field}") and not printed.out and not (tmp_path / "run").exists()
    assert len(sample) >= 30


def test_numbers_too_long_to_read(tmp_path: Path) -> None:
    for text in ("9" * 5000, "-" + "9" * 5000):
        with pytest.raises(UsageError, match=r"quantize\.bits"):
            resolve("compress_and_recover", sets=[f"quantize.bits={text}"])


def test_a_field_that_nothing_reads_is_refused() -> None:
    """Each condition of each field: its words name a setting of the method, and against it the field may not differ from its default."""
    checked = 0
    for stage, method in METHODS:
        for row in (row for row in fields_of(stage, method) if row.where):
            assert set(re.findall(r"[a-z_]+(?= is )", row.where)) <= set(r.name for r in fields_of(stage, method)), row
            checked += 1
    assert checked > 100
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("decompose", {"method": "qera_exact", "iterations": 5}, "decompose.iterations: 5 is read only where requantize is true"),
        ("prune", {"method": "sparsegpt", "clip": "none"}, "prune.clip: 'none' is read only where bits is set"),
        ("recover", {"loss": "cross_entropy", "temperature": 2}, "recover.temperature: 2.0 is read only where loss is distill or both"),
        ("recover", {"method": "perp", "rank": 3}, "recover.rank: 3 is read only where lora is not none"),
        ("quantize", {"overrides": {"q": {"bit": 3}}}, "unknown setting of quantize gptq 'bit'"),
        ("quantize", {"method": "block_training", "overrides": {"q": {"steps": 3}}}, "so this is one for all; set quantize.steps"),
        (
            "decompose",
            {"overrides": {"q": {"iterations": 3}}},
            "decompose.overrides[q].iterations: 3 is read only where requantize is true",
        ),
        ("quantize", {"method": "nf4", "group_size": 32}, "unknown setting of quantize nf4 'group_size'"),
        ("quantize", {"method": "nf4", "symmetric": True}, "unknown setting of quantize nf4 'symmetric'"),
    ]
    for stage, written, words in cases:
        assert words in refused({"stages": [{stage: written}]})
    assert "allocation.bits: is read only where there is a budget" in refused({"stages": [{"quantize": {}}], "allocation": {"bits": 2}})
    assert "no stage of this recipe learns from one" in refused({"stages": [{"quantize": {}}], "teacher": "org/model"})


UNREAD = {
    "decompose.iterations=1": "decompose.iterations: 1 is read only where requantize is true",
    "recover.temperature=1": "recover.temperature: 1.0 is read only where loss is distill or both",
    "allocation.weighting=fisher": "allocation.weighting: is read only where there is a budget",
}


@pytest.mark.parametrize("text", UNREAD)
def test_a_setting_of_the_command_line_that_nothing_reads_is_refused_at_its_default_too(text: str, tmp_path: Path) -> None:
    """A file may hold it, as what `show` prints does; an override, which holds nothing but what was written, may not."""
    stages = [{"decompose": {"method": "qera_exact"}}, {"recover": {"loss": "cross_entropy"}}]
    usual = resolve({"stages": stages})
    (stage, _, field), value = text.split("=")[0].partition("."), text.split("=")[1]
    assert getattr(usual.allocation if stage == "allocation" else usual.stage(stage).config, field) == yaml.safe_load(value)
    with pytest.raises(UsageError, match=re.escape(UNREAD[text])):
        resolve({"stages": stages}, sets=[text])
    (tmp_path / "written.yaml").write_text(usual.to_yaml())
    assert resolve(str(tmp_path / "written.yaml")) == usual
    with pytest.raises(UsageError, match=re.escape("decompose.overrides[q].iterations: 1 is read only where requantize is true")):
        resolve({"stages": [{"decompose": {"overrides": {"q": {"iterations": 1}}}}]})


def test_a_setting_of_the_command_line_may_take_back_what_a_file_says() -> None:
    """A method that does not read what the recipe gave another one: the value of the recipe is refused, its default is the way out."""
    file = {"stages": [{"decompose": {"method": "best", "iterations": 3}}], "allocation": {"bits": 2}}
    with pytest.raises(UsageError, match=re.escape("decompose.iterations: 3 is read only where requantize is true")):
        resolve(file, sets=["decompose.method=zeroquant_v2"])
    with pytest.raises(UsageError, match=re.escape("allocation.bits: is read only where there is a budget")):
        resolve(file, sets=["decompose.method=zeroquant_v2", "decompose.iterations=1"])
    actual = resolve(file, sets=["decompose.method=zeroquant_v2", "decompose.iterations=1", "allocation.bits=[2,3,4]"])
    assert actual.stages[0].method == "zeroquant_v2"
