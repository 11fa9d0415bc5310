"""Bytes by shapes: what every matrix will store after each stage of a recipe. Reads no weights.

Knows stages' settings and the records they leave (compress/options.Grid counts a grid's bits); not what a run costs in time or memory.
"""

from dataclasses import dataclass, field
from typing import Any

from ..compress.factors import FactorBits, FactorForm
from ..compress.grids import UniformGrid
from ..compress.options import Grid
from .models import Site, Structure, tied_names
from .stage_settings import StageSpec, methods

ENTRY_BYTES = 70
"""Of a tensor's entry in a safetensors header, besides its name."""
SHARD_BYTES = 48


@dataclass
class Size:
    """Bits that one linear stores, by what stores them, and the tensors they lie in; `compressed` once a stage made a record of it."""

    base: float
    mask: float = 0
    low_rank: float = 0
    base_names: tuple[str, ...] = ("weight",)
    factor_names: tuple[str, ...] = ("low_rank.up", "low_rank.down")
    compressed: bool = False

    @property
    def bits(self) -> float:
        return self.base + self.mask + self.low_rank

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.base_names, *(("mask",) if self.mask else ()), *(self.factor_names if self.low_rank else ()))

    def header_bytes(self, site: str) -> int:
        return sum(len(site) + 1 + len(name) + ENTRY_BYTES for name in self.names)


@dataclass(frozen=True)
class Sizes:
    """Every matrix by its name, and the bytes of everything else, headers of the files included."""

    structure: Structure
    of: dict[str, Size]
    rest_bytes: float
    weights: dict[str, int] = field(default_factory=dict)

    def total_bytes(self) -> float:
        return sum(size.bits / 8 + size.header_bytes(site) for site, size in self.of.items()) + self.rest_bytes

    def bits_per_weight(self) -> float:
        """Over the compressed matrices; before any is, over those of the blocks."""
        compressed = [n for n, size in self.of.items() if size.compressed]
        over = compressed or [s.name for s in self.structure.sites if s.block is not None]
        return sum(self.of[n].bits for n in over) / sum(self.weights[n] for n in over)


def dense_sizes(model: Any, structure: Structure, element: float) -> Sizes:
    """Before any stage: every matrix dense, `element` bytes a number."""
    weights = {s.name: s.shape[0] * s.shape[1] for s in structure.sites}
    tied = tied_names(model)
    plain = {f"{s.module}.{s.parameter}" for s in structure.sites}
    others = [n for n in model.state_dict() if n not in plain and n not in tied]
    total = sum(p.numel() for p in model.parameters())
    rest = (total - sum(weights.values())) * element + headers(others, structure.blocks)
    return Sizes(structure, {n: Size(count * element * 8) for n, count in weights.items()}, rest, weights)


def headers(names: list[str], blocks: int) -> int:
    """Of the shards of a model, for the tensors that are no matrix of a block."""
    return sum(len(n) + ENTRY_BYTES for n in names) + (2 * blocks + 1) * SHARD_BYTES


def apply(spec: StageSpec, sizes: Sizes) -> list[str]:
    """Change the sizes as the stage would; says what it will refuse."""
    refused: list[str] = []
    for site in sizes.structure.sites:
        if (site.block is None and not spec.include_head) or spec.skips(site.name):
            continue
        config = spec.config_for(site.name)
        try:
            _resize(spec, site, config, sizes.of[site.name])
        except ValueError as error:
            refused.append(f"{spec.address}: {site.name}: {error}")
    return refused[:5] + ([f"{spec.address}: … and {len(refused) - 5} more"] if len(refused) > 5 else [])


def _resize(spec: StageSpec, site: Site, config: Any, size: Size) -> None:
    rows, columns = site.shape
    if spec.name in ("prune", "quantize", "decompose"):
        size.compressed = True
        size.base_names = tuple(n.replace("weight", "base.weight") if n == "weight" else n for n in size.base_names)
    if spec.name == "prune":
        size.mask = rows * -(-columns // 8) * 8
        pattern = getattr(config, "pattern", "unstructured")
        if ":" in pattern and columns % int(pattern.split(":")[1]):
            raise ValueError(f"in_features {columns} is not a multiple of the {pattern.split(':')[1]} of pattern {pattern}")
    elif spec.name == "quantize":
        _quantized(rows, columns, config, size)
    elif spec.name == "decompose":
        rank = getattr(config, "rank", 0)
        if rank > min(rows, columns):
            raise ValueError(f"rank {rank} is above the smaller dimension {min(rows, columns)}; choose a smaller one")
        if hasattr(config, "bits"):
            _quantized(rows, columns, config, size)
        with_factors(size, site.shape, rank, getattr(config, "factor_bits", None) or 16)
    elif spec.name == "recover" and methods(spec.name)[spec.method].ways.stored_as == "low-rank pair" and site.expert is None:
        if not size.low_rank:
            with_factors(size, site.shape, min(getattr(config, "rank", 0), rows, columns), 16)
        size.compressed = True


def with_factors(size: Size, shape: tuple[int, int], rank: int, bits: FactorBits) -> None:
    """Give a matrix a low-rank term of this form."""
    size.low_rank = FactorForm(bits).stored_bits(rank, *shape) if rank else 0
    parts = ("",) if bits == 16 else (".codes", ".scales")
    size.factor_names = tuple(f"low_rank.{factor}{part}" for factor in ("up", "down") for part in parts)


def on_grid(size: Size, shape: tuple[int, int], grid: Grid, index: bool) -> None:
    """Give a matrix a base on this grid (whose pattern does not count here); `index`: a group index is stored beside it."""
    rows, columns = shape
    size.base = grid.stored_bits(rows, columns) + (columns * 32 if index else 0)
    if grid.kind == "normal_float":
        scales = ("base.absmax_codes", "base.absmax_scales", "base.absmax_offset") if grid.double_quantized else ("base.absmax",)
    else:
        scales = ("base.scales", *(() if grid.symmetric else ("base.zeros",)), *(("base.group_index",) if index else ()))
    size.base_names = ("base.codes", *scales)


def grid_of(config: Any) -> Grid:
    """The grid of a quantizing method's config."""
    if hasattr(config, "block_size"):
        return Grid("normal_float", getattr(config, "bits", 4), config.block_size, False, config.double_quantize)
    return Grid("uniform", config.bits, config.group_size, config.symmetric)


def has_index(config: Any) -> bool:
    """Whether a group index is stored beside the grid."""
    return getattr(config, "act_order", "") == "full"


def _quantized(rows: int, columns: int, config: Any, size: Size) -> None:
    """ValueError when the groups do not divide the row."""
    grid = grid_of(config)
    UniformGrid(grid.bits, grid.group_size).size(columns)
    on_grid(size, (rows, columns), grid, has_index(config))
