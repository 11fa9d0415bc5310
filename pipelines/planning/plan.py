"""The dry run: a run's predicted bytes, memory, disk, time and refusals, before any work. Knows shapes and configs, reads no weights; what a stage
costs on a device is `run_costs`."""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...compress.options import Setting
from ..allocation import spending
from ..devices.compute import Compute
from ..devices.environment import compute_of
from ..errors import InputError
from ..models.sizes import Sizes, apply, dense_sizes, fallback_notes, guided_groups
from ..models.source import load_config, positions, source_of, source_paths, weights_home
from ..models.structure import Structure, inspect, parameters_are_read, skeleton
from ..recipes.mixture import SELF, parse_mixture
from ..recipes.recipe import Recipe
from ..recipes.stage_settings import StageSpec, methods
from ..stages.baseline import check_source
from ..stages.inputs import Inputs
from ..store.rundir import OUTSIDE, RunDirectory, finished_blocks
from . import recovery_plan
from .cost_plan import Needs
from .imported_sizes import imported_sizes
from .run_costs import RunCosts
from .steps import Step, plan_steps, stored_choice
from .unread import unread

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def refusals(recipe: Recipe, source: Path) -> list[str]:
    """What a run of this recipe on the model in `source` would be refused for, one line each; empty when nothing is."""
    model = skeleton(load_config(source))
    imported = "quantization_config" in json.loads((weights_home(source) / "config.json").read_text())
    return _refusals(recipe, model, _sizes(source, model, inspect(model, include_head=True)), imported)


def _refusals(recipe: Recipe, model: "PreTrainedModel", sizes: Sizes, imported: bool) -> list[str]:
    """`sizes` become those behind the last stage."""
    refused, left_open = _too_long(recipe, positions(model.config)), []
    if recipe.budget is not None:
        result = spending.refusals(recipe, sizes)
        if result:
            return refused + result
        left_open = spending.spent(recipe).addresses
    for spec in recipe.stages:
        if spec.name == "recover":
            refused += recovery_plan.refusals(spec, recipe, model, sizes, imported)
        refused += unread(spec, recipe, model, sizes)
        unfit = apply(spec, sizes)
        refused += [] if spec.address in left_open else unfit
    return refused + _unroundable(model, sizes)


def warnings(recipe: Recipe, source: Path) -> dict[str, str]:
    """What is done all the same, with a warning, by the address of the stage: too little calibration text for the widest matrix."""
    structure = inspect(skeleton(load_config(source)), include_head=True)
    tokens, result = recipe.calibration.samples * recipe.calibration.seq_len, {}
    for spec in recipe.stages:
        if spec.name not in ("prune", "quantize", "decompose"):
            continue
        sites = [s for s in structure.sites if (s.block is not None or spec.include_head) and not spec.skips(s.name)]
        if sites and "second_moment" in methods(spec.name)[spec.method].needs(spec.config):
            widest = max(sites, key=lambda site: site.shape[1])
            if tokens < widest.shape[1]:
                enough = -(-widest.shape[1] // recipe.calibration.seq_len)
                result[spec.address] = (
                    f"{tokens:,} calibration tokens are fewer than the {widest.shape[1]:,} inputs of {widest.name}: what is fitted to its second "
                    f"moment fits this text alone; --set calibration.samples={enough} would do"
                )
    return result


def _replaced_types(specs: Iterable[StageSpec], structure: Structure) -> list[str]:
    """Matrices that get another type of ggml than the requested one."""
    quantize = [spec for spec in specs if spec.name == "quantize"]
    reached = [[s for s in structure.sites if (s.block is not None or spec.include_head) and not spec.skips(s.name)] for spec in quantize]
    return [f"{spec.address}: {note}" for spec, sites in zip(quantize, reached, strict=True) for note in fallback_notes(spec, sites)]


@dataclass(frozen=True)
class Costed:
    """A prediction of one process, and what it was made from: by a stage's address what it takes, one thing after the other; nothing where the
    run would be refused."""

    report: dict[str, Any]
    costs: RunCosts
    needs: dict[str, tuple[Needs, ...]]
    specs: dict[str, StageSpec]


def predict(recipe: Recipe, directory: Path | None = None, device: str = "auto") -> dict[str, Any]:
    """A JSON-able prediction by stage, and what will be refused. InputError when the model itself cannot be used."""
    return costed(recipe, directory, device).report


def costed(recipe: Recipe, directory: Path | None = None, device: str = "auto") -> Costed:
    """As `predict`, with what it was made from."""
    source = source_of(recipe)
    model = skeleton(load_config(source))
    structure = inspect(model, include_head=True)
    element = _element_bytes(source)
    sizes = _sizes(source, model, structure)
    compute = compute_of(None if directory is None else RunDirectory(directory), device, recipe.dtype, recipe.deterministic)
    costs = RunCosts.of(model, recipe, compute, element)
    refused = refusals(recipe, source)
    place = RunDirectory(directory) if directory is not None and (directory / "run.json").is_file() else None
    inputs = Inputs(recipe, source)
    if not refused:
        check_source(source)
        inputs.check(recipe.stages, writes=False)
    steps = plan_steps(recipe, source, inputs, compute, place) if place is not None and not refused else []
    budget = _allocation(recipe, sizes, inputs, compute, place, steps) if recipe.budget is not None and not refused else None
    specs = [step.spec for step in steps if step.spec is not None] or recipe.stages
    writes = not refused and inputs.to_write(specs)
    stored = sum(path.stat().st_size for path in source_paths(source).values())
    result = _costed(recipe, specs, costs, sizes, stored, refused, budget, writes)
    noted = [*warnings(recipe, source).values(), *(_replaced_types(specs, structure) if not refused else [])]
    finished = [step.address for step in steps if place is not None and place.state(step.name) == "done"]
    return replace(result, report=result.report | {"warnings": list(dict.fromkeys(noted)), "finished": finished})


def costed_of_config(recipe: Recipe, config: "PreTrainedConfig", device: str = "auto") -> Costed:
    """The same of a model that nobody has: of a configuration alone, stored in its dtype. Texts are not looked at; what the model would write
    itself is taken to be missing."""
    assert isinstance(config.dtype, torch.dtype)
    model, element = skeleton(config), float(config.dtype.itemsize)
    structure = inspect(model, include_head=True)
    costs = RunCosts.of(model, recipe, compute_of(None, device, recipe.dtype, recipe.deterministic), element)
    refused = _refusals(recipe, model, dense_sizes(model, structure, element), imported=False)
    sizes = dense_sizes(model, structure, element)
    budget = _allocation(recipe, sizes, None, costs.compute, None, []) if recipe.budget is not None and not refused else None
    writes = any(SELF in [share.source for share in parse_mixture(text)] for text in (recipe.data.calibration, recipe.data.train))
    return _costed(recipe, recipe.stages, costs, sizes, sizes.total_bytes(), refused, budget, writes)


def _costed(
    recipe: Recipe,
    specs: list[StageSpec],
    costs: RunCosts,
    sizes: Sizes,
    stored: float,
    refused: list[str],
    budget: "_Budget | None",
    writes: bool,
) -> Costed:
    """Stage by stage; `stored`: bytes of the model as it comes."""
    structure, model = sizes.structure, costs.plan.anatomy.model
    needs = {"baseline": costs.baseline(sizes)}
    stages = [_row("baseline", None, sizes) | costs.row(needs["baseline"]) | {"total_bytes": round(stored)}]
    extra_bytes, gathers_fisher, guided = 0, True, set[tuple[object, ...]]()
    for number, spec in enumerate(specs):
        before = copy.deepcopy(sizes)
        apply(spec, sizes)
        extra_bytes += recovery_plan.extra_bytes(spec, model, sizes) if spec.name == "recover" else 0
        row = _row(spec.address, spec.method, sizes, extra_bytes) | (budget.at_most(number) if budget is not None else {})
        gathered = [] if budget is None or number != budget.first else budget.gathered(costs, before)
        if gathers_fisher and (_reads_fisher(spec) or (gathered and recipe.allocation.weighting == "fisher")):
            gathered, gathers_fisher = [costs.fisher(), *gathered], False
        groups = _guided(spec, structure)
        if groups and groups not in guided:
            gathered = [*gathered, costs.guidance(spec)]
            guided.add(groups)
        gathered = [costs.self_text(), *gathered] if writes and number == 0 else gathered
        if not refused:
            needs[spec.address] = costs.stage(spec, before, sizes, number == 0, gathered)
        stages.append(row | (costs.row(needs[spec.address]) if not refused else {}))
    by_address = {spec.address: spec for spec in specs}
    most = {kind: max(row.get(kind, 0) for row in stages) for kind in ("device_bytes", "host_bytes")}
    report = {
        "recipe": recipe.name,
        "model": recipe.model,
        "device": costs.compute.device.type,
        "dtype": costs.compute.dtype_name,
        "parameters": costs.plan.anatomy.parameters,
        "blocks": structure.blocks,
        "matrices": sum(site.block is not None for site in structure.sites),
        "skipped": [{"name": s.name, "reason": s.reason} for s in structure.skipped],
        **({"allocation": budget.report} if budget is not None else {}),
        "stages": stages,
        "refusals": refused,
        "shortages": costs.shortages(by_address, stages) if not refused else [],
        "warnings": [],
        "peak_bytes": most["device_bytes"],
        **most,
        "disk_bytes": round(sum(row["total_bytes"] for row in stages[1:])),
        "seconds": round(sum(row.get("seconds", 0) for row in stages)),
        "finished": [],
    }
    return Costed(report, costs, needs, by_address)


@dataclass(frozen=True)
class _Budget:
    """What the plan reports of a budget, and what the stages from the `first` on take at most; nothing where the choice is made. `missing`: blocks of its
    table that are not there, and `outside` the matrices outside of them."""

    report: dict[str, Any]
    first: int
    limit: dict[str, Any]
    stages: spending.Spent
    settings: list[Setting]
    missing: int
    outside: list[spending.Outside]

    def gathered(self, costs: RunCosts, before: Sizes) -> list[Needs]:
        """What building the table takes, or what is missing of it."""
        lacking = self.missing or self.outside
        return [costs.table(self.stages, self.settings, before, self.missing, self.outside)] if lacking else []

    def at_most(self, number: int) -> dict[str, Any]:
        return self.limit if number >= self.first else {}


def _allocation(
    recipe: Recipe, dense: Sizes, inputs: Inputs | None, compute: Compute, place: RunDirectory | None, steps: list[Step]
) -> _Budget:
    """What the budget chooses from, the range of sizes that the choices span, and whether the table it is chosen by is there."""
    stages = spending.spent(recipe)
    counted = spending.costs(recipe, stages, dense)
    smallest, largest = (stages.budget.text_of(n, counted.weights, counted.rest_bytes) for n in (counted.smallest, counted.largest))
    limit = min(stages.budget.bytes_for(counted.weights, counted.rest_bytes), counted.largest)
    blocks, chosen, outside = 0, None, counted.outside
    if place is not None and inputs is not None:
        directory, chosen = stored_choice(recipe, steps[stages.first].key, inputs, compute, place)
        blocks, outside = finished_blocks(directory), [] if (directory / OUTSIDE).is_file() else outside
    missing = dense.structure.blocks - blocks
    parts = [f"{missing} of {dense.structure.blocks} blocks"] if missing else []
    parts += [each.site.name for each in outside]
    table = f"will be built for {', '.join(parts)}" if parts else "is there"
    report = {"budget": stages.budget.text, "settings": len(counted.settings), "matrices": len(counted.sites)}
    report |= {"smallest": smallest, "largest": largest, "table": table, "chosen": None if chosen is None else chosen.stored}
    at_most = {"bits_per_weight": round(limit * 8 / counted.weights, 4), "total_bytes": round(limit + counted.rest_bytes)}
    return _Budget(
        report, stages.first, {} if chosen is not None else at_most, stages, spending.settings_of(recipe, stages), missing, outside
    )


def _guided(spec: StageSpec, structure: Structure) -> tuple[object, ...]:
    """The matrices whose tokens' gradients the stage reads, and in how many groups: what was gathered once is there for the next."""
    sites = [] if spec.name != "quantize" else [s for s in structure.sites if s.block is not None and not spec.skips(s.name)]
    return tuple((s.name, count) for s in sites if (count := guided_groups(spec, s)))


def _reads_fisher(spec: StageSpec) -> bool:
    if spec.name not in ("prune", "quantize", "decompose"):
        return False
    return "fisher" in methods(spec.name)[spec.method].needs(spec.config)


def _sizes(source: Path, model: "PreTrainedModel", structure: Structure) -> Sizes:
    """Before any stage: dense, or as the program stored it that quantized this checkpoint."""
    return imported_sizes(source, model, structure) or dense_sizes(model, structure, _element_bytes(source))


def _element_bytes(source: Path) -> float:
    """Of the first matrix's dtype. InputError for a file that cannot be read."""
    from safetensors import SafetensorError, safe_open

    first = next(iter(source_paths(source).values()))
    try:
        with safe_open(first, framework="pt") as shard:
            name = max(shard.keys(), key=lambda n: len(shard.get_slice(n).get_shape()))
            return torch.empty(0, dtype=shard.get_tensor(name).dtype).element_size()
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{first}: not a readable safetensors file ({error}); download the model again") from error


def _unroundable(model: "PreTrainedModel", sizes: Sizes) -> list[str]:
    """Matrices whose inputs a stage rounds, which only a call of their linear can do, where the model's code multiplies by itself."""
    linears = [s.name for s in sizes.structure.sites if s.expert is None and sizes.of[s.name].rounds_inputs]
    result = [name for name in linears if parameters_are_read(model, name)]
    leaves = sorted({name.rpartition(".")[2] for name in result})
    return [f"activations: the model's code multiplies with {result[0]} by itself; leave such out, as in ignore={leaves}"] if result else []


def _too_long(recipe: Recipe, limit: int | None) -> list[str]:
    """Windows beyond the positions that the model knows: an index error, or numbers without meaning."""
    lengths = {"evaluation.seq_len": recipe.evaluation.seq_len, "calibration.seq_len": recipe.calibration.seq_len}
    lengths |= {f"{spec.address}.seq_len": spec.config.seq_len for spec in recipe.stages if spec.name == "recover"}
    return [
        f"{key} {length} is above the {limit} positions of this model; --set {key}={limit}"
        for key, length in lengths.items()
        if limit is not None and length > limit
    ]


def _row(stage: str, method: str | None, sizes: Sizes, extra_bytes: int = 0) -> dict[str, Any]:
    return {
        "stage": stage,
        "method": method,
        "bits_per_weight": round(sizes.bits_per_weight(), 4),
        "total_bytes": round(sizes.total_bytes()) + extra_bytes,
    }
