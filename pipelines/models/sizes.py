"""Predicted sizes: the bytes that every matrix will store after each stage of a recipe, from shapes alone. Reads no weights.

Knows stages' settings and the records they leave (compress/options.Grid counts a grid's bits); not what a run costs in time or memory.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from ...compress.factors import FactorBits, FactorForm
from ...compress.ggml_types import GGML_TYPES, GridName, type_for
from ...compress.grids import divide
from ...compress.guided import row_groups
from ...compress.options import Grid, ggml_grid
from ...recover.selection import roles
from ..recipes.stage_settings import StageSpec, methods
from ..store.artifact import Artifact
from .source import load_config
from .structure import Site, Structure, inspect, is_tied, skeleton, tied_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ENTRY_BYTES = 70
"""Of a tensor's entry in a safetensors header, without its name."""
SHARD_BYTES = 48


@dataclass
class Size:
    """Bits that one linear stores, by what stores them, and the tensors they lie in; `compressed` once a stage made a record of it,
    `rounds_inputs` once one quantizes its activations. `open_factors`: the grid of its factors is chosen while it is solved. `whole`: on a
    uniform grid of 4 bits at most, with whole zero points and contiguous groups, which a product of integers can read."""

    base: float
    mask: float = 0
    low_rank: float = 0
    base_names: tuple[str, ...] = ("weight",)
    factor_names: tuple[str, ...] = ("low_rank.up", "low_rank.down")
    compressed: bool = False
    rounds_inputs: bool = False
    open_factors: bool = False
    whole: bool = False

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
    """Every matrix by its name, and the bytes of everything else, headers of the files included. `embeddings` is the name by which the
    token embeddings go: the head's, where they are one matrix."""

    structure: Structure
    of: dict[str, Size]
    rest_bytes: float
    weights: dict[str, int] = field(default_factory=dict)
    embeddings: str | None = None

    @property
    def tied(self) -> bool:
        table = self.structure.embeddings
        return table is not None and self.embeddings not in (None, table.name)

    def name_of(self, site: Site) -> str:
        """By which a matrix goes here."""
        return self.embeddings if site == self.structure.embeddings and self.embeddings is not None else site.name

    def total_bytes(self) -> float:
        return sum(size.bits / 8 + size.header_bytes(site) for site, size in self.of.items()) + self.rest_bytes

    def bits_per_weight(self) -> float:
        """Over the compressed matrices; before any is, over those of the blocks."""
        compressed = [n for n, size in self.of.items() if size.compressed]
        over = compressed or [s.name for s in self.structure.sites if s.block is not None]
        return sum(self.of[n].bits for n in over) / sum(self.weights[n] for n in over)


def dense_sizes(model: "PreTrainedModel", structure: Structure, element: float) -> Sizes:
    """Before any stage: every matrix dense, `element` bytes a number."""
    sites, table = list(structure.sites), structure.embeddings
    head, tied = structure.head, is_tied(model, structure)
    sites += [] if table is None or tied else [table]
    weights = {s.name: s.shape[0] * s.shape[1] for s in sites}
    copies = tied_names(model)
    plain = {f"{s.module}.{s.parameter}" for s in [*sites, *([table] if table else [])]}
    others = [n for n in model.state_dict() if n not in plain and n not in copies]
    total = sum(p.numel() for p in model.parameters())
    rest_bytes = (total - sum(weights.values())) * element + headers(others, structure.blocks)
    embeddings = head.name if tied and head is not None else table.name if table is not None else None
    return Sizes(structure, {n: Size(count * element * 8) for n, count in weights.items()}, rest_bytes, weights, embeddings)


def sizes_before(artifact: Artifact) -> Sizes:
    """As if no stage had touched the matrices of this artifact, to the byte where it holds them dense."""
    model = skeleton(load_config(artifact.directory))
    structure, tied = inspect(model, include_head=True), tied_names(model)
    sizes = dense_sizes(model, structure, 4)
    known = {s.name: f"{s.module}.{s.parameter}" for s in [*structure.sites, *([structure.embeddings] if structure.embeddings else [])]}
    for name, size in sizes.of.items():
        stored = tied.get(known[name], known[name])
        if stored in artifact.index:
            shared = artifact.stored_bytes(stored) // math.prod(artifact.shape(stored))
            size.base = sizes.weights[name] * shared * 8
    others = [n for n in model.state_dict() if n not in known.values() and n not in tied and n in artifact.index]
    rest_bytes = sum(artifact.stored_bytes(n) for n in others) + headers(others, structure.blocks)
    return replace(sizes, rest_bytes=rest_bytes)


def headers(names: list[str], blocks: int) -> int:
    """Of the shards of a model, for the tensors that are no matrix of a block."""
    return sum(len(n) + ENTRY_BYTES for n in names) + (2 * blocks + 1) * SHARD_BYTES


def apply(spec: StageSpec, sizes: Sizes) -> list[str]:
    """Change the sizes as the stage would; says what it will refuse."""
    refused: list[str] = []
    chosen = [s for s in sizes.structure.sites if (s.block is not None or spec.include_head) and not spec.skips(s.name)]
    for site in chosen:
        try:
            _resize(spec, site, spec.config_for(site.name), sizes.of[site.name])
        except ValueError as error:
            refused.append(f"{spec.address}: {site.name}: {error}")
    _share_factors(spec, sizes)
    nearest = rounded_to_nearest(spec, sizes.structure, sizes.tied)
    if spec.name in ("prune", "quantize", "decompose") and not chosen and not nearest:
        refused.append(f"{spec.address}: `ignore` leaves no linear layer to compress; name fewer")
    for key, site in nearest.items():
        size = sizes.of[sizes.name_of(site)]
        _quantized(*site.shape, spec.embedding_config(site.shape[1], getattr(spec, key)), size)
        size.compressed = True
    refused += _exact_head(spec, sizes)
    return refused[:5] + ([f"{spec.address}: … and {len(refused) - 5} more"] if len(refused) > 5 else [])


def fallback_notes(spec: StageSpec, sites: Iterable[Site]) -> list[str]:
    """Which matrices get another type than the requested grid, by width."""
    result: dict[tuple[str, str, int], int] = {}
    for site in sites:
        requested = getattr(spec.config_for(site.name), "grid", "uniform")
        if requested != "uniform" and (got := type_for(requested, site.shape[1])) != requested:
            result[requested, got, site.shape[1]] = result.get((requested, got, site.shape[1]), 0) + 1
    return [
        f"{count} matrices have {columns} columns, no multiple of the {GGML_TYPES[requested].columns} of a block of {requested}: they are {got}, "
        f"{GGML_TYPES[got].block_bits / GGML_TYPES[got].columns:g} bits a weight"
        for (requested, got, columns), count in result.items()
    ]


def rounded_to_nearest(spec: StageSpec, structure: Structure, tied: bool) -> dict[Literal["embedding_bits", "head_bits"], Site]:
    """What the stage rounds to nearest outside the blocks, by the setting that says to how many bits: the embeddings, when they are included,
    and a head of its own. Not a head that the method compresses, nor embeddings that are one matrix with it."""
    table, head = structure.embeddings, structure.head
    by_method = head is not None and spec.include_head and not spec.skips(head.name)
    result: dict[Literal["embedding_bits", "head_bits"], Site] = {}
    if table is not None and spec.include_embeddings and not spec.skips(table.name) and not (tied and by_method):
        result["embedding_bits"] = table
    if head is not None and spec.head_bits is not None and not by_method and not spec.skips(head.name) and not (tied and result):
        result["head_bits"] = head
    return result


def _exact_head(spec: StageSpec, sizes: Sizes) -> list[str]:
    """Embeddings cannot be rounded where they are one matrix with a head that `ignore` leaves exact."""
    table, name = sizes.structure.embeddings, sizes.embeddings
    if table is None or name in (None, table.name) or not spec.include_embeddings or spec.skips(table.name) or not spec.skips(str(name)):
        return []
    return [f"{spec.address}: {name} is to stay as it is (ignore) and is one matrix with {table.name}; set include_embeddings to false"]


def _share_factors(spec: StageSpec, sizes: Sizes) -> None:
    """Of matrices that read one input and have one config that says `shared`, the first alone stores the right factor."""
    holders: set[object] = set()
    for site in sizes.structure.sites:
        config = spec.config_for(site.name)
        if spec.name != "decompose" or not getattr(config, "shared", False) or spec.skips(site.name) or (reads := _input_of(site)) is None:
            continue
        if (reads, config) in holders:
            bits = getattr(config, "factor_bits", None) or 16
            sizes.of[site.name].low_rank = FactorForm(bits).factor_bits(site.shape[0], config.rank)
            sizes.of[site.name].factor_names = tuple(n for n in sizes.of[site.name].factor_names if n.startswith("low_rank.up"))
        holders.add((reads, config))


def _input_of(site: Site) -> tuple[int | None, str, int] | None:
    """The same for matrices that, by their names, read the same: q, k and v, gate and up."""
    parts = set(roles(site.name))
    index = next((i for i, names in enumerate(({"q", "k", "v"}, {"gate", "up"})) if parts and parts <= names), None)
    return None if index is None or site.expert is not None else (site.block, site.module.rpartition(".")[0], index)


def _resize(spec: StageSpec, site: Site, config: object, size: Size) -> None:
    rows, columns = site.shape
    if spec.name in ("prune", "quantize", "decompose"):
        size.compressed = True
        size.base_names = tuple(n.replace("weight", "base.weight") if n == "weight" else n for n in size.base_names)
    if (hasattr(config, "activations") or hasattr(config, "activation_bits")) and getattr(config, "bits", 0) is not None:
        size.rounds_inputs = getattr(config, "activations", None) is not None or getattr(config, "activation_bits", 16) < 16
    if spec.name == "prune":
        size.mask = rows * -(-columns // 8) * 8
        pattern = getattr(config, "pattern", "unstructured")
        if ":" in pattern and columns % int(pattern.split(":")[1]):
            raise ValueError(f"in_features {columns} is not a multiple of the {pattern.split(':')[1]} of pattern {pattern}")
        if getattr(config, "bits", None) is not None:
            _quantized(rows, columns, config, size)
    elif spec.name == "quantize" and getattr(config, "start", "") != "stored":
        if groups := guided_groups(spec, site):
            row_groups(site.shape[0], groups)
        _quantized(rows, columns, config, size)
    elif spec.name == "decompose":
        rank = getattr(config, "rank", 0)
        if rank > min(rows, columns):
            raise ValueError(f"rank {rank} is above the smaller dimension {min(rows, columns)}; choose a smaller one")
        if hasattr(config, "bits") and "base.codes" not in size.base_names:
            _quantized(rows, columns, config, size)
        with_factors(size, site.shape, rank, getattr(config, "factor_bits", None) or 16)
        size.open_factors = getattr(config, "factor_bits", 16) is None
    elif spec.name == "recover" and methods(spec.name)[spec.method].ways.stored_as == "low-rank pair":
        if not size.low_rank:
            with_factors(size, site.shape, min(getattr(config, "rank", 0), rows, columns), 16)
        size.compressed = True


def guided_groups(spec: StageSpec, site: Site) -> int:
    """In how many groups its rows are solved under their tokens' gradients, which are known of what every token reaches within the blocks; 0
    for plain second moments."""
    return getattr(spec.config_for(site.name), "guided", 0) if site.expert is None and site.block is not None else 0


def with_factors(size: Size, shape: tuple[int, int], rank: int, bits: FactorBits) -> None:
    """Give a matrix a low-rank term of this form."""
    size.low_rank = FactorForm(bits).stored_bits(rank, *shape) if rank else 0
    parts = ("",) if bits == 16 else (".codes", ".scales")
    size.factor_names = tuple(f"low_rank.{factor}{part}" for factor in ("up", "down") for part in parts)


def on_grid(size: Size, shape: tuple[int, int], grid: Grid, index: bool) -> None:
    """Give a matrix a base on this grid (whose pattern does not count here); `index`: a group index is stored with it."""
    rows, columns = shape
    size.base = grid.stored_bits(rows, columns) + (columns * 32 if index else 0)
    if grid.kind in GGML_TYPES:
        layout = GGML_TYPES[type_for(grid.kind, columns)]
        extra_names = ("super_minima",) if layout.minima else (), ("small_codes",) if layout.small_codes else ()
        scales = ("base.super_scales", *(f"base.{name}" for names in extra_names for name in names))
    elif grid.kind == "normal_float":
        scales = ("base.absmax_codes", "base.absmax_scales", "base.absmax_offset") if grid.double_quantized else ("base.absmax",)
    else:
        scales = ("base.scales", *(() if grid.symmetric else ("base.zeros",)), *(("base.group_index",) if index else ()))
    size.base_names = ("base.codes", *scales)
    size.whole = grid.kind == "uniform" and grid.bits <= 4 and not grid.float_zeros and not index


def grid_of(config: Any) -> Grid:
    """The grid of a quantizing method's config."""
    if hasattr(config, "block_size"):
        return Grid("normal_float", getattr(config, "bits", 4), config.block_size, False, config.double_quantize)
    kind: GridName = getattr(config, "grid", "uniform")
    if kind != "uniform":
        return ggml_grid(kind)
    float_zeros = getattr(config, "float_zeros", False)
    return Grid("uniform", config.bits, config.group_size, config.symmetric, float_zeros=float_zeros)


def has_index(config: object) -> bool:
    """Whether a group index is stored with the grid."""
    return getattr(config, "act_order", "") == "full"


def _quantized(rows: int, columns: int, config: object, size: Size) -> None:
    """ValueError when the groups do not divide the row, or a mask does not go with the grid."""
    grid = grid_of(config)
    if grid.kind in GGML_TYPES:
        type_for(grid.kind, columns, bool(size.mask))
    else:
        divide(columns, grid.group_size, "block_size" if grid.kind == "normal_float" else "group_size")
    _divided(config, columns)
    on_grid(size, (rows, columns), grid, has_index(config))


def _divided(config: object, columns: int) -> None:
    if (activations := getattr(config, "activations", None)) is not None:
        activations.divide(columns)
