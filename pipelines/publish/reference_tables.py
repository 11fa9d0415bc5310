"""What `make publish` measures: the reference tables by name; `publishing` measures their rows."""

from .reference_compress import COMPRESS, DECOMPOSE
from .reference_recover import GRID, PERP, RECOVER_NOTE, recover_rows
from .reference_rows import SMALL, ReferenceRow, ReferenceTable, Stage, prune, quantize

CHAIN: tuple[tuple[str, Stage], ...] = (
    ("prune", prune(sparsity=0.4)),
    ("quantize", quantize(4)),
    ("decompose", {"decompose": {"method": "best", "rank": 8, "iterations": 2}}),
    (
        "recover",
        {"recover": {"method": "lora", "norms": True, "scales": "auto", "steps": 24, "batch_size": 2, "seq_len": 128, "loss": "both"}},
    ),
    ("fuse", {"fuse": {"method": "bind", "backend": "auto"}}),
)
"""The default recipe's stages, its training short."""


def _dtype_rows() -> list[ReferenceRow]:
    """Everything up to each stage, computed in either dtype; of the demo model `demo_table` has the recipe's own run."""
    whole: list[Stage] = [stage for _, stage in CHAIN]
    return [
        ReferenceRow(name, tuple(whole[:count]), {"dtype": dtype}, SMALL, dtype=dtype)
        for count, (name, _) in enumerate(CHAIN, 1)
        for dtype in ("float32", "bfloat16")
    ]


DTYPE = ReferenceTable(
    "Forward passes in float32 and in bfloat16, stage by stage of the default recipe",
    _dtype_rows(),
    ("dtype",),
    within=("dtype",),
    notes=(
        "Each row is a run of its own in its dtype, calibration, training and measuring included: 40 % by Wanda, GPTQ in 4 bits, two rounds of "
        "`best` in the bytes of rank 8, 24 steps of 256 tokens on both losses, the kernels.",
        "One artifact measured in both dtypes differs by 0.01 to 0.02 % (small model, quantize and decompose): what differs more between two rows is "
        "which codes were chosen behind inputs that differ in their last bits, and KL to the dense model (0.0154 and 0.0155 nats behind decompose) says as much of one as of the other. "
        "Another seed of the calibration text moves the float32 row there from 29.09 to 29.21.",
    ),
)


def tables() -> dict[str, ReferenceTable]:
    """All reference tables by name; `recover` reads its methods from their registry."""
    recover = ReferenceTable(
        "Recovery: every method on every kind of compressed model",
        recover_rows(),
        ("kind", "seed"),
        panel="kind",
        within=("kind",),
        notes=(RECOVER_NOTE,),
    )
    return {"compress": COMPRESS, "decompose": DECOMPOSE, "recover": recover, "perp": PERP, "grid": GRID, "dtype": DTYPE}
