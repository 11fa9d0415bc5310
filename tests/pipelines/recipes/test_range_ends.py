"""Both ends of what every field may be, really run on a tiny model: done, or one line with exit 2 or 3 before the work; never exit 1."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines import cli
from bitmend.pipelines.recipes.stage_settings import STAGES, config_keys, methods

from ..drawn import ends, every_field, required_settings
from ..families import save_speaking
from ..runs import write_recipe

pytestmark = pytest.mark.usefixtures("no_pages")

FIELDS = list(every_field())
FEW: dict[str, Any] = {"calibration": {"samples": 2, "seq_len": 16}, "evaluation": {"seq_len": 16, "windows": 1}}
SMALL: dict[str, Any] = {
    "steps": 2, "batch_size": 1, "seq_len": 16, "samples": 2, "rank": 2, "group_size": 32, "block_size": 32, "iterations": 2, "bottleneck": 4,
    "tokens": 2, "hidden": 8, "smoothing_steps": 2, "warmup": 1,
}  # fmt: skip
LONG = {
    "steps": 10_000_000,
    "iterations": 10_000,
    "smoothing_steps": 10_000,
    "samples": 1_000_000,
    "accumulation": 65536,
    "batch_size": 65536,
}
"""Upper ends that say how long to work, or how much at once: only built (test_fields)."""
QUANTIZED = {"quantize": {"method": "rtn", "group_size": 32}}
BASES: dict[str, list[list[dict[str, Any]]]] = {
    "prune": [[]],
    "quantize": [[]],
    "decompose": [[QUANTIZED], []],
    "recover": [[QUANTIZED], [], [QUANTIZED, {"decompose": {"rank": 2}}]],
    "fuse": [[QUANTIZED], [{"quantize": {"method": "rtn", "group_size": 32, "activations": {"bits": 8}}}]],
}
"""What may stand before a stage: of those that its defaults can follow, the first after which a value is done."""

AGAIN = {name for name, row in methods("decompose").items() if name == "svdquant" or row.defaults.get("requantize")}
"""Of decompositions, those that iterate by themselves."""

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    save_speaking("llama", directory, small_model, num_hidden_layers=2)
    return directory


@pytest.fixture
def run(tiny: Path, small_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """(exit code, the error's line) of `pipeline run` on the tiny model, in one directory: what stages have in common is done once."""
    monkeypatch.setattr("bitmend.pipelines.stages.inputs.HELD_OUT_TOKENS", 64)

    def started(stages: list[dict[str, Any]], *more: str) -> tuple[int, str]:
        recipe = write_recipe(tmp_path / "r.yaml", stages, **FEW)
        arguments = ["run", str(recipe), "-m", str(tiny), "--data", str(small_text), "-o", str(tmp_path / "run"), "--device", "cpu", "-q"]
        capsys.readouterr()
        code = cli.main([*arguments, *more])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (code != 0), (code, errors)
        return code, errors[0] if errors else ""

    return started


def small(stage: str, method: str, **written: Any) -> dict[str, Any]:
    known = config_keys(methods(stage)[method])
    unread = {"perp": {"rank"}, "sparsegpt": {"group_size"}}.get(method, set()) | (
        {"iterations"} if stage == "decompose" and method not in AGAIN else set()
    )
    fewer = {key: value for key, value in SMALL.items() if key in known and key not in unread}
    return {stage: {"method": method, **fewer, **written}}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "method"), [(stage, method) for stage in STAGES for method in methods(stage)])
def test_every_end_of_every_field(stage: str, method: str, run: Run) -> None:
    bases = [base for base in BASES[stage] if run([*base, small(stage, method)])[0] == 0]
    assert bases, "its defaults can follow nothing"
    done, refused, wrong, code, line = 0, [], [], 0, ""
    for _, _, field, hint in (row for row in FIELDS if row[:2] == (stage, method)):
        for value in ends(hint):
            if LONG.get(field) == value:
                continue
            written = small(stage, method, **{**required_settings(stage, method, field, value), field: value})
            for base in bases:
                code, line = run([*base, written])
                if code == 0:
                    break
            if code == 0:
                done += 1
            elif code in (2, 3) and (field in line or repr(value) in line):
                refused.append(line)
            else:
                wrong.append(f"{field}={value!r}: exit {code}, {line}")
    print(f"{stage} {method}: {done} ends done, {len(refused)} refused", *sorted(set(refused)), *wrong, sep="\n  ")
    assert not wrong, "\n".join(wrong)


NOT_THE_WORK = ("dataclasses", "bitmend.pipelines.recipes.", "bitmend.pipelines.planning.", "bitmend.recover.recovery_methods", "bitmend.recover.refusals", "tests.")
"""What reads every field to name, compare, check or predict a stage."""
OF_A_DATACLASS = ("__eq__", "__hash__", "__repr__", "__init__", "__post_init__")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., set[str]]:
    """The names of fields that the work itself reads from configs of these classes, from now on."""

    def recorded(*classes: type) -> set[str]:
        actual: set[str] = set()

        def attribute(config: Any, name: str) -> Any:
            frame = sys._getframe(1)
            place = frame.f_globals.get("__name__", "")
            if not place.startswith(NOT_THE_WORK) and frame.f_code.co_name not in OF_A_DATACLASS:
                actual.add(name)
            return object.__getattribute__(config, name)

        for kind in classes:
            monkeypatch.setattr(kind, "__getattribute__", attribute)
        return actual

    return recorded


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "method"), [(stage, method) for stage in STAGES for method in methods(stage)])
def test_every_setting_is_read_by_the_work(stage: str, method: str, run: Run, read: Callable[..., set[str]]) -> None:
    row = methods(stage)[method]
    actual = read(row.config)
    assert any([run([*base, small(stage, method)])[0] == 0 for base in BASES[stage]]), "its defaults can follow nothing"
    for _, _, field, hint in (one for one in FIELDS if one[:2] == (stage, method)):
        for value in ends(hint):
            if field in actual:
                break
            if LONG.get(field) != value:
                written = small(stage, method, **{**required_settings(stage, method, field, value), field: value})
                for base in BASES[stage]:
                    run([*base, written])
        assert field in actual, f"{field} is accepted and nothing that works reads it"


TRAINING: list[dict[str, Any]] = [
    {"clip": 0},
    {"learning_rate": 1e-300, "clip": 65536},
    {"temperature": 0.01, "warmup": 10_000_000, "eval_every": 10_000_000},
    {"temperature": 100, "warmup": 0, "eval_every": 1, "accumulation": 3},
]


def test_ends_that_many_set(run: Run) -> None:
    """A chain of them, in `make test`; every end of every field is in `make proofs`."""
    solvers: list[dict[str, Any]] = [
        {"prune": {"method": "sparsegpt", "damp": 0, "sparsity": 0}},
        small("quantize", "gptq", damp=10, first_order=0.999, correction=1, refit=1),
        small("decompose", "best", overlap=0, factor_bits=4),
    ]
    for method, some in (("lora", TRAINING[:2]), ("scales", TRAINING[2:])):
        assert run([*solvers, *(small("recover", method, **written) for written in some)]) == (0, "")
    code, line = run([*solvers, small("recover", "lora", learning_rate=10)])
    assert code == 3 and "try a smaller recover.learning_rate" in line


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("stage", "method", "written"),
    [
        ("decompose", "qera_exact", {"rank": 65}),
        ("decompose", "svdquant", {"rank": 65536, "group_size": 64}),
        ("recover", "lora", {"rank": 65}),
        ("recover", "dora", {"rank": 65536}),
        ("recover", "lota", {"rank": 65}),
        ("recover", "lr_qat", {"rank": 65}),
        ("recover", "serial_adapter", {"bottleneck": 65}),
        ("recover", "prefix_tuning", {"tokens": 65}),
        ("quantize", "gptq", {"group_size": 65536}),
        ("quantize", "nf4", {"activations": {"bits": 4, "group_size": 65}}),
    ],
)
def test_beyond_the_matrix_is_refused_with_the_numbers_before_the_work(
    stage: str, method: str, written: dict[str, Any], dry: bool, run: Run, tmp_path: Path
) -> None:
    code, line = run([QUANTIZED, small(stage, method, **written)], *(["--dry-run"] if dry else []))
    value = next(iter(written.values()))
    value = value["group_size"] if isinstance(value, dict) else value
    assert code == 2 and str(value) in line and "64" in line.replace(str(value), "", 1), line
    assert not list(tmp_path.glob("run/stages/*"))


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (
            [{"quantize": {**QUANTIZED["quantize"], "ignore": ["qproj"]}}],
            r"quantize.ignore: 'qproj' matches none of the 16 matrices .* q_proj",
        ),
        ([{"prune": {"overrides": {"mlp.dwn": {"sparsity": 0.1}}}}], "prune.overrides: 'mlp.dwn' matches none of the 14 matrices"),
        ([{"prune": {"overrides": {"lm_head": {"sparsity": 0.1}}}}], "prune.overrides: 'lm_head' matches none of the 14 matrices"),
        (
            [QUANTIZED, {"decompose": {"rank": 2}}, small("recover", "lora", rank=3)],
            "recover.rank: 3 would not be read: .* factors of rank 2",
        ),
        ([QUANTIZED, small("decompose", "svdquant", bits=3)], "decompose.bits: 3 would not be read: every matrix keeps the grid"),
        ([QUANTIZED, small("recover", "lora", targets="nothing")], "targets 'nothing' and layers 'all' leave none of 14 linears"),
        ([QUANTIZED, small("recover", "lora", layers=[2])], "block numbers of this model run from 0 to 1"),
    ],
)
def test_what_matches_nothing_in_this_model(stages: list[dict[str, Any]], words: str, dry: bool, run: Run, tmp_path: Path) -> None:
    code, line = run(stages, *(["--dry-run"] if dry else []))
    assert code == 2 and re.search(words, line), line
    assert not list(tmp_path.glob("run/stages/*"))


@pytest.mark.parametrize("dry", [True, False])
def test_options_that_would_do_nothing(dry: bool, run: Run) -> None:
    more = ["--dry-run"] if dry else []
    assert run([QUANTIZED, {"fuse": {}}], "--from", "fuse", "--until", "quantize", *more) == (
        2, "error: --from fuse lies behind --until quantize: nothing would be done; the stages are baseline, quantize, fuse"
    )  # fmt: skip
    code, line = run([QUANTIZED], "--revision", "main", *more)
    assert code == 2 and "has no revisions; leave it out" in line
    for ratio in ("nan", "inf", "-1"):
        code, line = run([QUANTIZED], "--max-perplexity-ratio", ratio, *more)
        assert code == 2 and "--max-perplexity-ratio" in line
