"""Recipes: layers and their precedence, addresses, profiles, validation, the round trip through YAML."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import pytest
from annotated_types import Ge, Le
from bitmend.compress.ranges import Factor, Iterations, Layers, Pattern, Rate, Share, Steps, Width
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.recipes import recipe as recipes
from bitmend.pipelines.recipes import settings, stage_settings
from bitmend.pipelines.recipes.recipe import Budget, Recipe, resolve, run_directory
from hypothesis import given
from hypothesis import strategies as st

REAL_METHODS = stage_settings.methods


@dataclass(frozen=True)
class Prune:
    sparsity: Share = 0.5
    pattern: Pattern = "unstructured"


@dataclass(frozen=True)
class Grid:
    clip: bool = True
    norm: Factor = 2.4


@dataclass(frozen=True)
class Gptq:
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: Annotated[int, Ge(-1), Le(1024)] = 64
    act_order: bool = True
    grid: Grid = field(default_factory=Grid)

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size {self.group_size} is not positive; choose 32, 64 or 128")


@dataclass(frozen=True)
class Rtn:
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: Width = 64


@dataclass(frozen=True)
class Decompose:
    rank: Width = 16
    iterations: Iterations = 1


@dataclass(frozen=True)
class Lora:
    steps: Steps = 100
    learning_rate: Rate | None = None
    layers: Layers = "all"


@dataclass(frozen=True)
class Row:
    config: type
    defaults: dict[str, Any] = field(default_factory=dict)
    version: int = 1


METHODS = {
    "prune": {"wanda": Row(Prune), "magnitude": Row(Prune)},
    "quantize": {"gptq": Row(Gptq), "rtn": Row(Rtn)},
    "decompose": {"qera_exact": Row(Decompose), "loftq": Row(Decompose, {"iterations": 5})},
    "recover": {"lora": Row(Lora), "perp": Row(Lora)},
    "fuse": stage_settings.FUSE,
}

BASIC = """
stages:
  - prune: {method: wanda, sparsity: 0.4}
  - quantize: {method: gptq, bits: 4, act_order: false}
  - quantize: {method: rtn, bits: 8}
  - fuse: {backend: auto}
"""


@pytest.fixture(autouse=True)
def _methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_settings, "methods", METHODS.__getitem__)


@pytest.fixture
def basic(tmp_path: Path) -> Path:
    path = tmp_path / "basic.yaml"
    path.write_text(BASIC)
    return path


def written(tmp_path: Path, text: str, name: str = "other.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stages_are_built_in_order_with_addresses_and_defaults(basic: Path) -> None:
    made = resolve(str(basic))
    assert [(spec.name, spec.address, spec.method) for spec in made.stages] == [
        ("prune", "prune", "wanda"),
        ("quantize", "quantize", "gptq"),
        ("quantize", "quantize.2", "rtn"),
        ("fuse", "fuse", "bind"),
    ]
    assert made.stages[1].config == Gptq(bits=4, act_order=False)
    assert made.stage("quantize.1") is made.stages[1]
    assert (made.name, made.model, made.profile) == ("basic", "demo", "demo")


def test_precedence_command_line_over_file_over_recipe_over_profile(tmp_path: Path, basic: Path) -> None:
    assert resolve(str(basic)).calibration.samples == recipes.PROFILES["demo"]["calibration"]["samples"]
    recipe = written(tmp_path, BASIC + "calibration: {samples: 33}\nseed: 1\n", "recipe.yaml")
    assert resolve(str(recipe)).calibration.samples == 33
    file = written(tmp_path, "calibration: {samples: 44}\nquantize.2: {bits: 3}\nseed: 2\n")
    over = resolve(str(recipe), file=file)
    assert (over.calibration.samples, over.calibration.seq_len, over.seed) == (44, 512, 2)
    assert [spec.config.bits for spec in over.stages[1:3]] == [4, 3]
    top = resolve(str(recipe), file=file, sets=["calibration.samples=55", "quantize.2.bits=2"], options={"seed": 3, "model": None})
    assert (top.calibration.samples, top.seed, top.stages[2].config.bits) == (55, 3, 2)


def test_profile_follows_the_model_unless_named(tmp_path: Path) -> None:
    text = BASIC + "profiles: {demo: {prune: {sparsity: 0.1}}, standard: {prune: {sparsity: 0.6}, evaluation: {windows: 7}}}\n"
    recipe = str(written(tmp_path, text))
    assert resolve(recipe).stages[0].config.sparsity == 0.1
    other = resolve(recipe, options={"model": "some/model"})
    assert (other.profile, other.stages[0].config.sparsity, other.evaluation.windows) == ("standard", 0.6, 7)
    assert (other.calibration.samples, other.calibration.seq_len, other.evaluation.seq_len) == (128, 2048, 2048)
    assert resolve(recipe, options={"profile": "standard"}).stages[0].config.sparsity == 0.6
    assert resolve(recipe, sets=["profile=standard", "prune.sparsity=0.9"]).stages[0].config.sparsity == 0.9
    assert "unknown profile 'fast'" in refused(recipe, options={"profile": "fast"})


def test_one_source_for_all_text_and_the_specific_ones_win(basic: Path) -> None:
    made = resolve(str(basic), options={"data": "wikitext2", "eval": "other.txt"})
    assert (made.data.calibration, made.data.train, made.data.evaluation) == ("wikitext2", "wikitext2", "other.txt")
    assert resolve(str(basic), sets=["data=c4"]).data.train == "c4"
    assert resolve(str(basic), sets=["data.train=c4"]).data.calibration == "demo"


def test_existing_paths_become_absolute(basic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("a text")
    monkeypatch.chdir(tmp_path)
    basic.write_text(BASIC + "  - recover: {method: lora}\n")
    made = resolve(str(basic), options={"model": "model", "data": "text.txt", "teacher": "org/model"})
    assert made.model == str(tmp_path / "model")
    assert made.data.calibration == str(tmp_path / "text.txt")
    assert made.teacher == "org/model"


def test_method_none_skips_and_keeps_the_other_addresses(basic: Path) -> None:
    made = resolve(str(basic), sets=["quantize.method=none", "quantize.2.bits=3"])
    assert [spec.address for spec in made.stages] == ["prune", "quantize.2", "fuse"]
    assert made.stage("quantize.2").config.bits == 3
    assert made.to_yaml().count("method: none") == 1


def test_a_changed_method_drops_what_was_written_for_the_other_one(basic: Path) -> None:
    made = resolve(str(basic), sets=["quantize.method=rtn", "quantize.group_size=32"])
    assert made.stages[1].config == Rtn(bits=4, group_size=32)
    message = refused(str(basic), sets=["quantize.method=rtn", "quantize.act_order=true"])
    assert "quantize: unknown setting of quantize rtn 'act_order'" in message


def test_defaults_of_a_preset_lie_under_what_is_written(tmp_path: Path) -> None:
    recipe = written(tmp_path, "stages: [{decompose: {method: loftq, rank: 4}}, {decompose: {method: loftq, iterations: 2}}]")
    first, second = resolve(str(recipe)).stages
    assert (first.config, second.config) == (Decompose(4, 5), Decompose(16, 2))


def test_common_settings_and_overrides(basic: Path) -> None:
    sets = [
        "quantize.ignore=[lm_head, 'layers\\.0\\.']",
        "quantize.include_head=true",
        "quantize.overrides={down_proj: {bits: 8, grid: {clip: false}}}",
    ]
    spec = resolve(str(basic), sets=sets).stages[1]
    assert (spec.skips("model.layers.0.q_proj"), spec.skips("model.layers.1.q_proj"), spec.include_head) == (True, False, True)
    assert spec.config_for("layers.3.down_proj") == Gptq(bits=8, act_order=False, grid=Grid(clip=False))
    assert spec.config_for("layers.3.q_proj") is spec.config


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["quantise.bits=3"], "did you mean 'quantize'?"),
        (["quantize.bit=3"], "did you mean 'bits'?"),
        (["quantize.method=gtpq"], "did you mean 'gptq'? known: gptq, none, rtn"),
        (["quantize.bits=7"], "quantize.bits: expected 2|3|4|5|6|8, got 7"),
        (["quantize.group_size=0"], "group_size 0 is not positive; choose 32, 64 or 128"),
        (["quantize.grid.clp=true"], "quantize.grid: unknown setting 'clp'; did you mean 'clip'?"),
        (["quantize.3.bits=4"], "no stage 'quantize.3'; its stages are: prune, quantize, quantize.2, fuse"),
        (["quantize.overrides={x: {bit: 3}}"], "quantize.overrides[x]: unknown setting of quantize gptq 'bit'"),
        (["quantize.overrides={x: {bits: 7}}"], "quantize.overrides[x].bits"),
        (["quantize.overrides=3"], "quantize.overrides: expected {REGEX"),
        (["quantize.ignore=['(']"], "quantize.ignore: expected regular expressions, got ['(']"),
        (["quantize.include_head=3"], "quantize.include_head: expected true|false, got 3"),
        (["fuse.backend=gpu"], "fuse.backend: expected auto|triton|cpu-int4|cpu-int8|dense|reference, got 'gpu'"),
        (["evaluation.seqlen=3"], "evaluation: unknown key 'seqlen'; did you mean 'seq_len'?"),
        (["evaluation.windows=0"], "evaluation.windows: expected 1 … 1,000,000 or null, got 0"),
        (["data.evalation=x"], "did you mean 'evaluation'?"),
        (["calibration=5"], "calibration: "),
        (["seed=-1"], "seed: "),
        (["seed=18446744073709551616"], "seed: expected 0 … 9,223,372,036,854,775,807, got 18446744073709551616"),
        (["prune.sparsity=.nan"], "prune.sparsity: expected [0, 1), got nan"),
        (["quantize.overrides={q_proj: {bits: .inf}}"], "quantize.overrides[q_proj].bits: expected 2|3|4|5|6|8, got inf"),
        (["budget=3"], "budget: expected bits per weight or bytes, as in 3.0bpw or 60MB, or null, got 3"),
        (["quantize"], "expected KEY=VALUE"),
        (["quantize.bits=[1"], "--set quantize.bits, line 1: not readable as YAML"),
        (["quantize=3"], "quantize: expected `key: value` settings, got 3"),
        (["stages=[{prine: {}}]"], "did you mean 'prune'?"),
        (["stages=[]"], "the recipe has no stages"),
        (["stages=[3]"], "entry 1 should be one `stage: {settings}`"),
    ],
)
def test_what_is_wrong_is_reported_with_the_way_out(basic: Path, sets: list[str], expected: str) -> None:
    assert expected in refused(str(basic), sets=sets)


def test_unknown_recipe_and_unreadable_files(tmp_path: Path, basic: Path) -> None:
    assert "did you mean 'compress_and_recover'?" in refused("compres_and_recover")
    assert "no such file" in refused(str(tmp_path / "absent.yaml"))
    assert "line 3: not readable as YAML" in refused(str(written(tmp_path, "a: 1\nb: [\n")))
    assert "the key 'seed' stands here twice" in refused(str(written(tmp_path, "seed: 1\nseed: 2\n")))
    assert "unhashable key" in refused(str(written(tmp_path, "? [1, 2]\n: 3\n")))
    assert "unknown key '1'" in refused(str(written(tmp_path, "1: 2\n")))
    assert "expected `key: value` lines" in refused(str(written(tmp_path, "- a\n")))
    assert "unknown key 'sed'" in refused(str(basic), file=written(tmp_path, "sed: 1\n"))
    assert "unknown profile 'fast'" in refused(str(written(tmp_path, BASIC + "profiles: {fast: {seed: 1}}\n")))
    assert "unknown key 'model'" in refused(str(written(tmp_path, BASIC + "profiles: {demo: {model: x}}\n")))


def test_scalars_are_read_without_surprises() -> None:
    read = settings.parse("{pattern: 2:4, rate: 1e-3, on: off, n: 010, x: 0x10, t: true, e: }", "here")
    assert read == {"pattern": "2:4", "rate": 1e-3, "on": "off", "n": 10, "x": "0x10", "t": True, "e": None}


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs", "Cc"]))
    | st.sampled_from(["2:4", "1e-3", "yes", "null", "010", ".5", "~"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(categories=["Ll"]), min_size=1), inner, max_size=3),
    max_leaves=8,
)


@given(plain)
def test_dumped_values_are_read_back_the_same(value: Any) -> None:
    assert settings.parse(settings.dump(value), "here") == value


def test_the_resolved_recipe_round_trips(basic: Path, tmp_path: Path) -> None:
    sets = [
        "prune.pattern=2:4",
        "quantize.method=none",
        "quantize.2.overrides={'a\\.b': {bits: 2}}",
        "quantize.2.ignore=[head]",
        "evaluation.windows=null",
    ]
    basic.write_text(BASIC + "  - recover: {method: lora}\n")
    made = resolve(str(basic), sets=sets, options={"budget": "2.75bpw", "model": "org/m", "revision": "main", "teacher": "t"})
    again = resolve(str(written(tmp_path, made.to_yaml(), "recipe.resolved.yaml")))
    assert again == made
    assert again.to_yaml() == made.to_yaml()
    assert [asdict(spec.config) for spec in again.stages] == [asdict(spec.config) for spec in made.stages]


@pytest.mark.parametrize(
    ("text", "bits", "size"), [("3.0bpw", 3.0, None), ("60MB", None, 60_000_000), ("1.5GiB", None, 1_610_612_736), ("2 bpw", 2.0, None)]
)
def test_budgets(text: str, bits: float | None, size: int | None) -> None:
    made = Budget.parse(text)
    assert made is not None
    assert (made.bits_per_weight, made.total_bytes) == (bits, size)
    assert Budget.parse(made.text) == made


@pytest.mark.parametrize("text", ["0bpw", "-1MB", "3", "MB", "3 bits", "1ib"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="as in"):
        Budget.parse(text)


def test_run_directory_names_the_model_unless_it_is_the_demo(basic: Path) -> None:
    assert run_directory(resolve(str(basic))) == Path("runs/basic")
    assert run_directory(resolve(str(basic), options={"model": "org/Some Model"})) == Path("runs/basic-Some_Model")


@pytest.mark.parametrize("name", recipes.known_recipes())
@pytest.mark.parametrize("profile", ["demo", "standard"])
def test_packaged_recipes_resolve_with_the_real_methods(name: str, profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_settings, "methods", REAL_METHODS)
    text = resolve(name, options={"profile": profile}).to_yaml()
    made = resolve(str(written(tmp_path, text)))
    assert isinstance(made, Recipe)
    assert made.about
    assert made.to_yaml() == text
    assert made.stages[-1].name == "fuse"


def test_every_method_builds_with_its_defaults_and_round_trips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_settings, "methods", REAL_METHODS)
    for stage in stage_settings.STAGES:
        for method in REAL_METHODS(stage):
            spec = stage_settings.build(stage, stage, {"method": method})
            assert spec is not None
            assert stage_settings.build(stage, stage, settings.parse(settings.dump(spec.settings()), "here")) == spec


def test_fuse_offers_the_backends_that_the_kernels_have() -> None:
    linear = pytest.importorskip("bitmend.kernels.linear")
    assert set(get_args(get_type_hints(stage_settings.FuseConfig)["backend"])) == set(linear.BACKENDS)


def test_a_pattern_implies_its_sparsity_whatever_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--set prune.pattern=2:4 is all that is needed; two settings of the user's that contradict each other are still refused."""
    monkeypatch.setattr(stage_settings, "methods", REAL_METHODS)
    basic = written(tmp_path, "stages: [{prune: {method: wanda, sparsity: 0.4}}]")

    def pruned(*sets: str) -> Any:
        return resolve(str(basic), sets=list(sets)).stage("prune")

    assert pruned("prune.pattern=2:4").config.sparsity == 0.5 and pruned("prune.pattern=1:4").config.sparsity == 0.75
    assert pruned("prune.pattern=unstructured").config.sparsity == 0.4
    spec = pruned("prune.overrides={'mlp': {pattern: '1:4'}}")
    assert (spec.config_for("a.mlp.b").sparsity, spec.config_for("a.attn").sparsity) == (0.75, 0.4)
    alone = written(tmp_path, "stages: [{prune: {method: wanda, pattern: '1:4'}}]", "alone.yaml")
    assert resolve(str(alone)).stage("prune").config.sparsity == 0.75
    for sets in (("prune.pattern=2:4", "prune.sparsity=0.4"), ("prune.overrides={'mlp': {pattern: '2:4', sparsity: 0.4}}",)):
        with pytest.raises(UsageError, match=r"a sparsity of 0\.5, not 0\.4; set one to match"):
            pruned(*sets)
