"""Candidate kernels and block sizes of `weight_only_matmul_up` by rows of x, and the default that ships for each card: data.

A default was chosen without a card, from the compiled form (reports/published/kernels-static.md: no spill, fits the shared memory) and from
where each way was ahead when an H100 was last measured; a card that is measured replaces it. Knows numbers only.
"""

from .tuning import Blocks

# gemv: without the matrix unit. split: padded to 16 rows and split over the inputs. tile: a weight dequantized once for all rows of a tile.
# scratch: dequantized as a whole, then torch's matmul. torch-int4: torch's own operator. apart: the base by its own choice, then addmm.
GEMV, SPLIT, TILE, SCRATCH, INT4, APART = "gemv", "split", "tile", "scratch", "torch-int4", "apart"
WITHOUT_LOW_RANK = (SCRATCH, INT4)
"""Ways that have no place for a low-rank term: they are candidates behind `apart`."""

G16, G8, G16S, G32S = Blocks(16, 0, 4, 4, 1, GEMV), Blocks(8, 0, 2, 4, 1, GEMV), Blocks(16, 0, 4, 4, 8, GEMV), Blocks(32, 0, 8, 2, 8, GEMV)
S64, S64D, S128, S64W, S64X = (
    Blocks(64, 0, 4, 3, 4, SPLIT), Blocks(64, 0, 4, 3, 8, SPLIT), Blocks(128, 0, 8, 3, 4, SPLIT), Blocks(64, 0, 4, 3, 1, SPLIT),
    Blocks(64, 0, 4, 3, 16, SPLIT),
)  # fmt: skip
T128, T64, T128N, T64M, T64S, T128S, T256, T256S, W64, W128 = (
    Blocks(128, 128, 8, 3, 1, TILE, 1), Blocks(64, 64, 4, 4, 1, TILE, 1), Blocks(128, 64, 8, 3, 1, TILE, 1), Blocks(64, 128, 4, 3, 1, TILE, 1),
    Blocks(64, 64, 4, 4, 4, TILE, 1), Blocks(128, 128, 8, 3, 4, TILE, 1), Blocks(64, 256, 8, 3, 1, TILE, 1), Blocks(64, 256, 8, 3, 4, TILE, 1),
    Blocks(64, 64, 4, 3, 1, TILE), Blocks(128, 128, 8, 2, 1, TILE),
)  # fmt: skip
WHOLE, OWN, AFTER = Blocks(16, 0, 4, 1, 1, SCRATCH), Blocks(0, 0, 0, 0, 1, INT4), Blocks(0, 0, 0, 0, 1, APART)

CANDIDATES: tuple[tuple[int, int, tuple[Blocks, ...]], ...] = (
    (1, 8, (G16, G8, G16S, G32S)),
    (1, 32, (S64, S64D, S128, S64X)),
    (16, 32, (S64W,)),
    (1, 16, (OWN,)),
    (32, 4096, (T64, T64S, T128N, W64)),
    (128, 4096, (T128, T64M, T128S, T256, T256S, W128)),
    (128, 4096, (WHOLE,)),
)
"""(fewest rows, most rows, candidates); rows are those of a bucket."""

OLDER = (0, 0)
DEFAULTS: dict[tuple[int, int], tuple[tuple[int, Blocks], ...]] = {
    OLDER: ((64, S64), (4096, T128)),
    (8, 0): ((4, G16S), (32, S64), (64, T64S), (512, T128S), (4096, WHOLE)),
    (8, 9): ((4, G16S), (32, S64), (64, T64S), (512, T128S), (4096, WHOLE)),
    (9, 0): ((4, G16S), (32, S64), (64, T64S), (128, T128S), (512, T256S), (4096, WHOLE)),
}
"""Compute capability → (most rows, candidate); OLDER is for cards before sm_80, and for Triton's interpreter: few and large operations."""


def table_for(capability: tuple[int, int]) -> tuple[int, int]:
    """Whose defaults a card takes: the newest of the table that is not newer than the card."""
    return max(known for known in DEFAULTS if known <= capability)


def default_for(bucket: int, capability: tuple[int, int]) -> Blocks:
    return next(blocks for most, blocks in DEFAULTS[table_for(capability)] if bucket <= most)


def candidates_for(bucket: int, capability: tuple[int, int], low_rank: bool, int4: bool) -> tuple[Blocks, ...]:
    """The default first. `low_rank`: with a term fused, or `apart`; `int4`: whether torch's operator can carry the weight."""
    default = default_for(bucket, capability)
    choices = [blocks for fewest, most, some in CANDIDATES if fewest <= bucket <= most for blocks in some]
    if low_rank:
        choices = [*(blocks for blocks in choices if blocks.way not in WITHOUT_LOW_RANK), AFTER]
        default = AFTER if default.way in WITHOUT_LOW_RANK else default
    elif not int4:
        choices = [blocks for blocks in choices if blocks != OWN]
    return (default, *(blocks for blocks in choices if blocks != default))
