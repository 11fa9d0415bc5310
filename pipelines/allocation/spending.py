"""The choices that a budget allows: which stages it sets, which settings a matrix may get, and how many bytes every choice stores.

Knows recipes and shapes; no weights and no errors (`error_tables`), nor what is chosen in the end (`choice`).
Legend: M matrices, K settings.
"""

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...compress.ggml_types import GGML_TYPES, GgmlName, type_for
from ...compress.grids import divide
from ...compress.options import Setting, overrides, settings
from ...compress.ranges import Bits
from ...compress.rounding import RtnConfig
from ..errors import UsageError
from ..models.sizes import Sizes, apply, grid_of, has_index, on_grid, rounded_to_nearest, with_factors
from ..models.structure import Site, Structure
from ..recipes.budget import Budget, pattern
from ..recipes.recipe import Recipe
from ..recipes.stage_settings import StageSpec, methods

EMBEDDING_BITS: tuple[Bits, ...] = (4, 5, 6, 8)
"""Of matrices outside the blocks, where a budget in bytes names no others."""
SLACK = 0.01
"""What an estimate of the artifact's other bytes may be off before a budget is refused because of it."""


@dataclass(frozen=True)
class Spent:
    """The stages that a budget is spent on; `first` is the place of the earliest in the recipe. prune only where sparsity is chosen, too."""

    budget: Budget
    quantize: StageSpec
    decompose: StageSpec | None
    prune: StageSpec | None
    first: int

    @property
    def addresses(self) -> list[str]:
        return [spec.address for spec in (self.prune, self.quantize, self.decompose) if spec is not None]

    def sites(self, every: Iterable[Site]) -> list[Site]:
        """The matrices that get their settings from the budget: those of the blocks that quantize touches."""
        return [site for site in every if site.block is not None and not self.quantize.skips(site.name)]


def spent(recipe: Recipe) -> Spent:
    """UsageError where this recipe's stages cannot spend its budget, with the reason."""
    assert recipe.budget is not None
    option, named = (
        f"--budget {recipe.budget.text}",
        {name: [s for s in recipe.stages if s.name == name] for name in ("quantize", "decompose")},
    )
    for name, least in (("quantize", 1), ("decompose", 0)):
        if not least <= len(named[name]) <= 1:
            have = ", ".join(s.address for s in named[name]) or "none"
            raise UsageError(
                f"{option}: chooses the bits of one quantize stage and the ranks of one decompose stage; this recipe's {name}: {have}"
            )
    quantize, decompose = named["quantize"][0], next(iter(named["decompose"]), None)
    _check_method(option, quantize, ("bits",), "no bits to choose")
    if getattr(quantize.config, "grid", "uniform") == "uniform" and any("grid" in one for one in quantize.overrides.values()):
        raise UsageError(
            f"{option}: chooses bits and groups of uniform grids, and {quantize.address}.overrides have a grid of ggml's; leave it out, or set "
            f"{quantize.address}.grid to a type of ggml, as q4_k, to choose among types"
        )
    if hasattr(quantize.config, "block_size") and -1 in recipe.allocation.group_sizes:
        raise UsageError(f"{option}: allocation.group_sizes: {quantize.method} has no blocks of a whole row (-1); name their sizes")
    if recipe.allocation.errors == "iterates" and decompose is None:
        raise UsageError(f"{option}: allocation.errors: iterates are those of a decompose stage, and this recipe has none; set rounding")
    if decompose is not None:
        _check_method(option, decompose, ("rank", "factor_bits"), "a grid of its own and no factor_bits")
        if recipe.stages.index(decompose) < recipe.stages.index(quantize):
            raise UsageError(
                f"{option}: {decompose.address} stands before {quantize.address}; put it after, since it compensates the rounding error"
            )
        for rank in filter(None, recipe.allocation.ranks):
            try:
                replace(decompose.config, rank=rank)
            except ValueError as error:
                raise UsageError(f"{option}: allocation.ranks: {decompose.address} cannot have rank {rank}: {error}") from error
    prune = _prune(option, recipe, quantize)
    if _grids(recipe, quantize, prune) == ():
        raise UsageError(
            f"{option}: allocation.grids: a mask removes weights, and none of {', '.join(recipe.allocation.grids)} has a code for 0; "
            f"add one of {', '.join(name for name, layout in GGML_TYPES.items() if not layout.minima)}"
        )
    return Spent(recipe.budget, quantize, decompose, prune, recipe.stages.index(prune or quantize))


def _check_method(option: str, spec: StageSpec, keys: tuple[str, ...], lack: str) -> None:
    def serves(row: Any) -> bool:
        return all(key in row.config.__dataclass_fields__ for key in keys)

    if not serves(methods(spec.name)[spec.method]):
        others = ", ".join(name for name, row in methods(spec.name).items() if serves(row))
        raise UsageError(f"{option}: {spec.address}.method {spec.method} has {lack}; choose one of {others}")


def _grids(recipe: Recipe, quantize: StageSpec, prune: StageSpec | None) -> tuple[GgmlName, ...] | None:
    """The types of ggml to choose from, of which some have no code for what an earlier stage's mask removes; None where grids are not ggml's."""
    if getattr(quantize.config, "grid", "uniform") == "uniform":
        return None
    masked = prune is None and any(spec.name == "prune" for spec in recipe.stages[: recipe.stages.index(quantize)])
    return tuple(kind for kind in recipe.allocation.grids if not (masked and GGML_TYPES[kind].minima))


def _prune(option: str, recipe: Recipe, quantize: StageSpec) -> StageSpec | None:
    if not recipe.allocation.sparsities:
        return None
    before = [s for s in recipe.stages[: recipe.stages.index(quantize)] if s.name == "prune"]
    if len(before) != 1:
        raise UsageError(f"{option}: allocation.sparsities need one prune stage before {quantize.address}; this recipe has {len(before)}")
    if getattr(before[0].config, "allocation", "uniform") != "uniform":
        raise UsageError(
            f"{option}: {before[0].address}.allocation distributes sparsity, and so do allocation.sparsities; leave one of them out"
        )
    return before[0]


# -- settings and what they store --------------------------------------------------------------------------------------------------


def settings_of(recipe: Recipe, stages: Spent) -> list[Setting]:
    """All K settings; rank 0 is among them in any case, for what quantize alone will leave."""
    chosen, config = recipe.allocation, stages.quantize.config
    sparsities = [pattern(text) for text in chosen.sparsities] if stages.prune is not None else [("dense", 0.0)]
    ranks = sorted({0, *chosen.ranks}) if stages.decompose is not None else [0]
    if (types := _grids(recipe, stages.quantize, stages.prune)) is not None:
        return settings((), (), (), ranks, chosen.factor_bits, sparsities, types)
    books = hasattr(config, "block_size")
    result = settings(chosen.bits, chosen.group_sizes, chosen.double_quantize if books else (), ranks, chosen.factor_bits, sparsities)
    if books:
        return [setting for setting in result if setting.grid.kind == "normal_float"]
    own = grid_of(config)
    return [
        replace(s, grid=replace(own, **{key: getattr(s.grid, key) for key in ("bits", "group_size", "pattern", "sparsity")}))
        for s in result
    ]


@dataclass(frozen=True)
class Outside:
    """A matrix outside the blocks, and how it may be rounded to nearest; `key` is the setting of quantize that says its bits. `tied`: it is the
    token embeddings and the head, whichever of them `site` is."""

    site: Site
    key: Literal["embedding_bits", "head_bits"]
    tied: bool
    configs: tuple[RtnConfig, ...]

    @property
    def settings(self) -> list[Setting]:
        return [Setting(grid_of(config)) for config in self.configs]

    @property
    def looked_up(self) -> bool:
        return self.tied or self.key == "embedding_bits"

    @property
    def multiplied(self) -> bool:
        return self.tied or self.key == "head_bits"


def embedding_bits(recipe: Recipe) -> tuple[Bits, ...]:
    """What the matrices outside the blocks may have; empty where they are not the budget's."""
    chosen, budget = recipe.allocation.embedding_bits, recipe.budget
    return chosen if chosen is not None else EMBEDDING_BITS if budget is not None and budget.total_bytes is not None else ()


def outside(recipe: Recipe, stages: Spent, structure: Structure, tied: bool) -> list[Outside]:
    """UsageError where the recipe names their bits and quantize rounds none."""
    bits, spec = embedding_bits(recipe), stages.quantize
    result = rounded_to_nearest(spec, structure, tied)
    if recipe.allocation.embedding_bits and not result:
        raise UsageError(
            f"--budget {stages.budget.text}: allocation.embedding_bits: {spec.address} rounds neither the embeddings nor a head of its own; "
            f"set {spec.address}.include_embeddings or {spec.address}.head_bits, or leave it out"
        )
    return [
        Outside(site, key, tied, tuple(spec.embedding_config(site.shape[1], b) for b in sorted(bits)))
        for key, site in result.items()
        if bits
    ]


def all_settings(blocks: Iterable[Setting], outside: Iterable[Outside]) -> list[Setting]:
    """Every setting once: those of the blocks' matrices first."""
    return list(dict.fromkeys([*blocks, *(setting for each in outside for setting in each.settings)]))


_LEFT_ALONE: dict[str, dict[str, object]] = {"decompose": {"rank": 0}, "prune": {"pattern": "dense", "sparsity": 0.0}}
"""What a matrix that a stage ignores has, in that stage's words."""


def allowed(recipe: Recipe, stages: Spent, site: Site, setting: Setting) -> bool:
    """Whether the matrix may get it: it fits, its rank is among the choices, and no override of the recipe's own says otherwise."""
    if not setting.fits(*site.shape):
        return False
    if stages.decompose is not None and not stages.decompose.skips(site.name):
        if setting.rank not in recipe.allocation.ranks or (setting.rank == 0 and _needs_factors(recipe)):
            return False
    elif setting.rank:
        return False
    wanted = overrides(setting)
    for spec in (stages.quantize, stages.decompose, stages.prune):
        if spec is not None:
            own = {key: value for p, changes in spec.overrides.items() if re.search(p, site.name) for key, value in changes.items()}
            given = wanted.get(spec.name, _LEFT_ALONE.get(spec.name, {}))
            if any(given.get(key, value) != value for key, value in own.items()):
                return False
    return True


def _needs_factors(recipe: Recipe) -> bool:
    """Whether a stage after the budget's trains the factors of a decomposition and nothing else."""
    from ...recover.recovery_methods import refusal

    plain = [frozenset({"uniform"})]
    later = [spec for spec in recipe.stages if spec.name == "recover"]
    return any(refusal(s.method, plain, s.config) and not refusal(s.method, [plain[0] | {"low_rank"}], s.config) for s in later)


@dataclass(frozen=True)
class Costs:
    """Bytes at the end of the run: [M, K], inf where a setting may not be, headers counted when the budget is one of bytes; and what
    everything else of the artifact takes. Matrices outside the blocks come last."""

    sites: list[Site]
    settings: list[Setting]
    bytes_MK: NDArray[np.float64]
    rest_bytes: float
    outside: list[Outside]

    @property
    def weights(self) -> int:
        return sum(site.shape[0] * site.shape[1] for site in self.sites)

    @property
    def smallest(self) -> float:
        return float(self.bytes_MK.min(1).sum())

    @property
    def largest(self) -> float:
        return float(self.bytes_MK.max(1, where=np.isfinite(self.bytes_MK), initial=0.0).sum())


def costs(recipe: Recipe, stages: Spent, dense: Sizes) -> Costs:
    """`dense`: the sizes before any stage. Counted is what the whole recipe will have stored: masks of a prune stage that is not
    chosen for, and the factors that recovery gives a matrix that has none."""
    end, plain = deepcopy(dense), deepcopy(dense)
    for spec in recipe.stages:
        apply(spec, plain)
        if spec not in (stages.decompose, stages.prune):
            apply(spec, end)
    sites, outside_blocks, blocks = (
        stages.sites(dense.structure.sites),
        outside(recipe, stages, dense.structure, dense.tied),
        settings_of(recipe, stages),
    )
    result, fitting = all_settings(blocks, outside_blocks), set(blocks)
    headers = recipe.budget is not None and recipe.budget.total_bytes is not None
    rows = []
    for site in sites:
        index = has_index(stages.quantize.config_for(site.name))
        fits = [s in fitting and allowed(recipe, stages, site, s) for s in result]
        rows.append([_stored(end, site, s, index, headers) if fit else np.inf for s, fit in zip(result, fits, strict=True)])
    for each in outside_blocks:
        rows.append([_stored(plain, each.site, s, False, headers) if s in each.settings else np.inf for s in result])
    sites += [each.site for each in outside_blocks]
    own = {plain.name_of(site) for site in sites}
    others = replace(plain, of={name: size for name, size in plain.of.items() if name not in own})
    return Costs(sites, result, np.array(rows), others.total_bytes(), outside_blocks)


def _stored(end: Sizes, site: Site, setting: Setting, index: bool, headers: bool) -> float:
    size = replace(end.of[name := end.name_of(site)])
    on_grid(size, site.shape, replace(setting.grid, pattern="dense"), index)
    if setting.grid.pattern != "dense":
        size.mask = site.shape[0] * -(-site.shape[1] // 8) * 8
    if setting.rank:
        with_factors(size, site.shape, setting.rank, setting.factor_bits)
    return size.bits / 8 + (size.header_bytes(name) if headers else 0)


def refusals(recipe: Recipe, dense: Sizes) -> list[str]:
    """Why the budget cannot be met, as far as shapes show."""
    try:
        stages = spent(recipe)
        counted = costs(recipe, stages, dense)
        _check_fits(recipe, stages, counted)
        slack = SLACK * counted.rest_bytes if stages.budget.total_bytes is not None else 0.0
        if stages.budget.bytes_for(counted.weights, counted.rest_bytes - slack) < counted.smallest:
            raise UsageError(infeasible(recipe, stages, counted))
    except UsageError as error:
        return [str(error)]
    return []


def _check_fits(recipe: Recipe, stages: Spent, counted: Costs) -> None:
    option = f"--budget {recipe.budget.text}" if recipe.budget else ""
    for rank in recipe.allocation.ranks:
        most = max(min(site.shape) for site in counted.sites if site.block is not None)
        if rank > most:
            raise UsageError(f"{option}: allocation.ranks: rank {rank} is above the smaller dimension of every matrix, at most {most}")
    for m, site in enumerate(counted.sites):
        if not np.isfinite(counted.bytes_MK[m]).any():
            ggml = getattr(stages.quantize.config, "grid", "uniform") != "uniform"
            key = "grids" if ggml else "group_sizes"
            choices = getattr(recipe.allocation, key)
            try:
                for choice in choices:
                    type_for(choice, site.shape[1]) if ggml else divide(site.shape[1], choice, "group size")
            except ValueError as error:
                raise UsageError(f"{option}: {site.name}: none of allocation.{key} {list(choices)} fits: {error}") from error
            raise UsageError(
                f"{option}: {site.name}: none of the choices of `allocation` fits it and the recipe's own overrides and stages"
            )


def infeasible(recipe: Recipe, stages: Spent, counted: Costs) -> str:
    least = stages.budget.text_of(counted.smallest, counted.weights, counted.rest_bytes)
    masks = any(spec.name == "prune" and spec != stages.prune for spec in recipe.stages)
    way = " (1 bit per weight of that are the masks of prune: --set prune.method=none leaves them out)" if masks else ""
    return f"--budget {stages.budget.text} is infeasible: the smallest that the choices of `allocation` can store is {least}{way}"
