"""Settings that nothing would read on this model: patterns that match no matrix, ranks and grids that an earlier stage has set.

Knows names and sizes; reads no weights.
"""

import difflib
import re
from typing import Any

from ...recover.attach import Dora, Lora
from ...recover.selection import where
from ..models.sizes import Sizes
from ..models.structure import Structure
from ..recipes.recipe import Recipe
from ..recipes.stage_settings import StageSpec, methods

NEAREST = 3
"""Names shown where a pattern matches none."""


def unread(spec: StageSpec, recipe: Recipe, model: Any, sizes: Sizes) -> list[str]:
    """One line for each; `sizes` are what the stages before this one will have made."""
    lines = _patterns(spec, sizes.structure)
    if spec.name == "recover":
        lines += _rank(spec, recipe, model, sizes)
    elif spec.name == "fuse":
        lines += _integer_scales(spec, sizes)
    elif spec.name == "decompose" and hasattr(spec.config, "bits"):
        lines += _grid(spec, sizes)
    return [f"{spec.address}.{line}" for line in lines]


def _patterns(spec: StageSpec, structure: Structure) -> list[str]:
    reached = [s.name for s in structure.sites if (s.block is not None or spec.include_head) and not spec.skips(s.name)]
    known = [s.name for s in structure.sites] + [s.name for s in structure.skipped]
    known += [] if structure.embeddings is None else [structure.embeddings.name]
    lines = [_unmatched("ignore", pattern, known) for pattern in spec.ignore]
    lines += [_unmatched("overrides", pattern, reached) for pattern in spec.overrides]
    return [line for line in lines if line is not None]


def _unmatched(key: str, pattern: str, names: list[str]) -> str | None:
    if any(re.search(pattern, name) for name in names):
        return None
    parts = dict.fromkeys([".".join(name.split(".")[-length:]) for length in (1, 2) for name in names] + names)
    nearest = difflib.get_close_matches(pattern.replace("\\", ""), parts, NEAREST, cutoff=0.0)
    return (
        f"{key}: {pattern!r} matches none of the {len(names)} matrices that it could; the nearest names are {', '.join(nearest) or 'none'}"
    )


def _rank(spec: StageSpec, recipe: Recipe, model: Any, sizes: Sizes) -> list[str]:
    """A rank for new factors, where every chosen matrix has some already, of another rank."""
    config = spec.config
    if not (isinstance(config, Lora | Dora) or getattr(config, "train", None) == "lora"):
        return []
    try:
        place = where(model, config.targets, config.layers)
    except ValueError:  # refused for itself
        return []
    chosen = [s.name for s in sizes.structure.sites if s.block is not None and place.linear(s.name)]
    earlier = recipe.stages[: [s.address for s in recipe.stages].index(spec.address)]
    ranks = {s.config_for(n).rank for s in earlier if s.name == "decompose" for n in chosen if not s.skips(n)}
    usual = set() if "rank" in spec.named else {type(config)().rank}
    if not chosen or not ranks or any(not sizes.of[n].low_rank for n in chosen) or config.rank in (ranks | usual):
        return []
    return [
        f"rank: {config.rank} would not be read: every chosen matrix has factors of rank {', '.join(map(str, sorted(ranks)))} from a decompose "
        "stage, which train as they are; set the rank there, and leave this one out"
    ]


def _integer_scales(spec: StageSpec, sizes: Sizes) -> list[str]:
    """Scales to be rounded a second time, where no matrix has both a rounded input and a grid that integers can be multiplied with."""
    rounded = [size for s in sizes.structure.sites if s.block is not None and (size := sizes.of[s.name]).rounds_inputs]
    if not spec.config.integer_scales or any(size.whole for size in rounded):
        return []
    why = (
        "no matrix with rounded inputs lies on a uniform grid of at most 4 bits with whole zero points and contiguous groups; set the quantize stage so"
        if rounded
        else 'no matrix has its inputs rounded; set quantize.activations={bits: 8, group_size: -1}'
    )
    return [f"integer_scales: true would not be read: {why}, or leave it out"]


def _grid(spec: StageSpec, sizes: Sizes) -> list[str]:
    """A grid for the residual, where every matrix is on one already and stays there."""
    sites = [s.name for s in sizes.structure.sites if s.block is not None and not spec.skips(s.name)]
    if not sites or any("base.codes" not in sizes.of[n].base_names for n in sites):
        return []
    default = methods(spec.name)[spec.method].config()
    keys = ("bits", "group_size", "symmetric")
    written = [key for key in keys if key in spec.named or getattr(spec.config, key) != getattr(default, key)]
    return [
        f"{key}: {getattr(spec.config, key)} would not be read: every matrix keeps the grid of the quantize stage before; set it there"
        for key in written
    ]
