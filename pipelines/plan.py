"""What a run would do, before any work: bytes, memory, disk, time and refusals. Knows shapes and configs, reads no weights."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..compress.grids import UniformGrid
from ..compress.packing import packed_words
from .models import Site, Structure, inspect, load_config, resolve_model, skeleton
from .recipe import Recipe
from .rundir import RunDirectory
from .stage_settings import StageSpec, methods

FACTOR_BYTES = 2


@dataclass
class Size:
    """Bits that one linear stores, by what stores them."""

    base: float
    mask: float = 0
    low_rank: float = 0

    @property
    def bits(self) -> float:
        return self.base + self.mask + self.low_rank


def predict(recipe: Recipe, directory: Path | None = None) -> dict[str, Any]:
    """A JSON-able prediction by stage, and what will be refused. InputError when the model itself cannot be used."""
    source = resolve_model(recipe.model, recipe.revision)
    model = skeleton(load_config(source))
    structure = inspect(model, include_head=True)
    total = sum(p.numel() for p in model.parameters())
    element = _element_bytes(source)
    sizes = {s.name: Size(_weights(s) * element * 8) for s in structure.sites if s.block is not None}
    rest_bytes = (total - sum(_weights(s) for s in structure.sites if s.block is not None)) * element
    speed = _multiplications_per_second()
    stages, refusals = [_row("baseline", None, structure, sizes, rest_bytes, _evaluation_seconds(recipe, total, speed))], []
    for spec in recipe.stages:
        compressed, refused = _apply(spec, structure, sizes)
        refusals += refused
        seconds = _seconds(spec, recipe, total, speed) + _evaluation_seconds(recipe, total, speed)
        stages.append(_row(spec.address, spec.method, structure, sizes, rest_bytes, seconds, compressed))
    finished = _finished(recipe, source, directory) if directory is not None else []
    return {
        "recipe": recipe.name,
        "model": recipe.model,
        "parameters": total,
        "blocks": structure.blocks,
        "matrices": len(sizes),
        "skipped": [{"name": s.name, "reason": s.reason} for s in structure.skipped],
        "stages": stages,
        "refusals": refusals,
        "peak_bytes": _peak_bytes(recipe, structure, total, element),
        "disk_bytes": round(sum(row["total_bytes"] for row in stages[1:])),
        "seconds": round(sum(row["seconds"] for row in stages)),
        "finished": finished,
    }


def _weights(site: Site) -> int:
    return site.shape[0] * site.shape[1]


def _element_bytes(source: Path) -> float:
    from safetensors import safe_open

    from .models import source_files

    first = next(iter(source_files(source)))
    with safe_open(source / first, framework="pt") as shard:
        name = max(shard.keys(), key=lambda n: len(shard.get_slice(n).get_shape()))
        return torch.empty(0, dtype=shard.get_tensor(name).dtype).element_size()


def _apply(spec: StageSpec, structure: Structure, sizes: dict[str, Size]) -> tuple[bool, list[str]]:
    """Change the sizes as the stage would; says what it will refuse."""
    refused: list[str] = []
    for site in structure.sites:
        if site.name not in sizes or spec.skips(site.name):
            continue
        config = spec.config_for(site.name)
        try:
            _resize(spec, site, config, sizes[site.name])
        except ValueError as error:
            refused.append(f"{spec.address}: {site.name}: {error}")
    return spec.name in ("prune", "quantize", "decompose"), refused[:5] + (
        [f"{spec.address}: … and {len(refused) - 5} more"] if len(refused) > 5 else []
    )


def _resize(spec: StageSpec, site: Site, config: Any, size: Size) -> None:
    rows, columns = site.shape
    if spec.name == "prune":
        size.mask = rows * -(-columns // 8) * 8
        pattern = getattr(config, "pattern", "unstructured")
        if ":" in pattern and columns % int(pattern.split(":")[1]):
            raise ValueError(f"in_features {columns} is not a multiple of the {pattern.split(':')[1]} of pattern {pattern}")
    elif spec.name == "quantize":
        bits = getattr(config, "bits", 4)
        block = getattr(config, "group_size", None) or getattr(config, "block_size", 64)
        group = UniformGrid(bits, block).size(columns)
        groups = columns // group
        codes = rows * packed_words(columns, bits) * 32
        if hasattr(config, "block_size"):
            scales = (
                rows * groups * 8 + -(-rows * groups // 256) * 32 + 32 if getattr(config, "double_quantize", False) else rows * groups * 32
            )
            size.base = codes + scales
        else:
            zeros = 0 if getattr(config, "symmetric", False) else rows * packed_words(groups, bits) * 32
            size.base = codes + rows * groups * 16 + zeros
    elif spec.name == "decompose":
        rank = getattr(config, "rank", 0)
        if rank > min(rows, columns):
            raise ValueError(f"rank {rank} is above the smaller dimension {min(rows, columns)}; choose a smaller one")
        size.low_rank = rank * (rows + columns) * getattr(config, "factor_bits", 8 * FACTOR_BYTES)


def _row(
    stage: str, method: str | None, structure: Structure, sizes: dict[str, Size], rest: float, seconds: float, compressed: bool = True
) -> dict[str, Any]:
    bits = sum(s.bits for s in sizes.values())
    weights = sum(_weights(s) for s in structure.sites if s.name in sizes)
    return {
        "stage": stage,
        "method": method,
        "bits_per_weight": round(bits / weights, 4),
        "total_bytes": round(bits / 8 + rest),
        "seconds": round(seconds),
    }


def _multiplications_per_second() -> float:
    """A short measurement of this machine: float32 multiply-adds a second in matrix products of a model's shape."""
    a, b = torch.randn(512, 1024), torch.randn(1024, 1024)
    a @ b
    began = time.monotonic()
    for _ in range(5):
        a @ b
    return 5 * 512 * 1024 * 1024 / max(time.monotonic() - began, 1e-9)


def _evaluation_seconds(recipe: Recipe, parameters: int, speed: float) -> float:
    windows = recipe.evaluation.windows or 160
    return windows * recipe.evaluation.seq_len * parameters / speed


def _seconds(spec: StageSpec, recipe: Recipe, parameters: int, speed: float) -> float:
    """Passes over the calibration text or training tokens, at the measured speed. Solvers add to it; the order is right."""
    if spec.name == "recover":
        tokens = getattr(spec.config, "steps", 0) * getattr(spec.config, "batch_size", 1) * getattr(spec.config, "seq_len", 512)
        return 4 * tokens * parameters / speed
    row = methods(spec.name)[spec.method] if spec.name != "fuse" else None
    passes = 2 if row is not None and row.needs(spec.config) else 0
    return passes * recipe.calibration.samples * recipe.calibration.seq_len * parameters / speed


def _peak_bytes(recipe: Recipe, structure: Structure, parameters: int, element: float) -> int:
    """Embeddings and head, one block in float32 with second moments and solver copies, hidden states; recovery holds the model."""
    in_blocks = sum(_weights(s) for s in structure.sites if s.block is not None)
    widest = max(s.shape[1] for s in structure.sites)
    block = in_blocks / structure.blocks * 4 * 4 + widest * widest * 4 * 4
    tokens = recipe.calibration.samples * recipe.calibration.seq_len
    hidden = tokens * min(s.shape[1] for s in structure.sites) * 4 * 2
    streamed = (parameters - in_blocks) * 4 + block + hidden
    recovery = parameters * 4 * 1.5 if any(s.name == "recover" for s in recipe.stages) else 0
    return round(max(streamed, recovery) + 0.5e9)


def _finished(recipe: Recipe, source: Path, directory: Path) -> list[str]:
    """Stages that an earlier run left and this one would reuse."""
    from .inputs import Inputs
    from .runner import plan_steps

    place = RunDirectory(directory)
    if not (directory / "run.json").is_file():
        return []
    return [step.address for step in plan_steps(recipe, source, Inputs(recipe, source)) if step.state(place) == "done"]
