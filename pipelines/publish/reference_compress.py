"""The rows of the tables of compression: pruning, quantization, decomposition."""

from .reference_rows import DEMO, SHORT, SHORT_NOTE, SMALL, ReferenceRow, ReferenceTable, Stage, prune, quantize

# -- compress --------------------------------------------------------------------------------------------------------------------


def _grids(bits: int) -> list[ReferenceRow]:
    named: dict[str, Stage] = {
        "rtn": quantize(bits, "rtn"),
        "rtn, clip hessian": quantize(bits, "rtn", clip="hessian"),
        "normal_float": quantize(bits, "normal_float"),
        "gptq, clip power": quantize(bits, clip="power"),
        "gptq, clip hessian": quantize(bits, clip="hessian"),
        "gptq_nf": quantize(bits, "gptq_nf"),
    }
    if bits < 4:
        named |= {
            "gptq, clip joint": quantize(bits, clip="joint"),
            "gptq, clip hessian, correction 0.5": quantize(bits, clip="hessian", correction=0.5),
            "gptq, clip hessian, first order 0.25": quantize(bits, clip="hessian", first_order=0.25),
            "gptq, clip hessian, refit 0.5": quantize(bits, clip="hessian", refit=0.5),
        }
    if bits == 3:
        named |= {name: quantize(bits, name, **SHORT) for name in ("block_training", "learned_rounding")}
    return [ReferenceRow(name, (stage,), {"bits": bits}) for name, stage in named.items()]


def _masks(pattern: str, shown: str) -> list[ReferenceRow]:
    return [ReferenceRow(method, (prune(method, pattern),), {"bits": shown}) for method in ("magnitude", "wanda", "sparsegpt")]


def _embeddings(bits: int) -> ReferenceRow:
    """The table, which is the head as well, and nothing else."""
    stage = quantize(bits, "rtn", ignore=[r"\.layers\."], include_embeddings=True, embedding_bits=bits, head_bits=bits)
    return ReferenceRow(f"embeddings and head alone, rtn, {bits} bits", (stage,), {"bits": "embeddings"})


COMPRESS = ReferenceTable(
    "Pruning and quantization of the demo model",
    [*_masks("unstructured", "50 %"), *_masks("2:4", "2:4"), *_grids(3), *_grids(4), *_grids(2), *map(_embeddings, (8, 6, 5, 4))],
    ("bits",),
    panel="bits",
    notes=(SHORT_NOTE,),
)

# -- decompose -------------------------------------------------------------------------------------------------------------------

_ROUND, _FEEDBACK, _BOOK = "rtn", "gptq", "normal_float"
PRESETS: dict[str, tuple[str, str]] = {
    "loftq": ("loftq", _ROUND),
    "lq_lora": ("lq_lora", _BOOK),
    "zeroquant_v2": ("zeroquant_v2", _ROUND),
    "lqer": ("lqer", _ROUND),
    "qera_approx": ("qera_approx", _ROUND),
    "qera_exact": ("qera_exact", _ROUND),
    "eora": ("eora", _FEEDBACK),
    "cloq": ("cloq", _FEEDBACK),
    "caldera": ("caldera", _FEEDBACK),
    "srr": ("srr", _FEEDBACK),
    "best": ("best", _FEEDBACK),
}
"""Preset → its method and the quantizer before it, as its paper has them (eora is the exact step on GPTQ's codes)."""
STRONGEST = ("eora", "cloq", "srr", "best")


def _decomposed(preset: str, bits: int, rank: int, model: str) -> ReferenceRow:
    tags = {"bits": bits, "rank": rank}
    if preset == "svdquant":
        return ReferenceRow(preset, ({"decompose": {"method": preset, "bits": bits, "rank": rank}},), tags, model)
    method, quantizer = PRESETS[preset]
    return ReferenceRow(preset, (quantize(bits, quantizer), {"decompose": {"method": method, "rank": rank}}), tags, model)


def _plain(bits: int, group_size: int, model: str) -> ReferenceRow:
    return ReferenceRow(f"gptq, group {group_size}, no factors", (quantize(bits, group_size=group_size),), {"bits": bits, "rank": 0}, model)


def _uniform(bits: int, group_size: int, rank: int, factor_bits: int) -> ReferenceRow:
    """GPTQ and the exact step with one setting for all matrices: what an allocation of as many bytes has to beat."""
    stages = (quantize(bits, group_size=group_size), {"decompose": {"method": "eora", "rank": rank, "factor_bits": factor_bits}})
    return ReferenceRow(f"eora, group {group_size}, {factor_bits}-bit factors", stages, {"bits": bits, "rank": rank})


def _allocated(budget: str) -> ReferenceRow:
    stages = (quantize(3), {"decompose": {"method": "eora"}})
    return ReferenceRow(f"gptq and eora, allocated {budget}", stages, {"bits": "mixed", "rank": "mixed"}, budget=budget)


ALLOCATED = [
    *(_allocated(budget) for budget in ("3.0bpw", "3.5bpw")),
    *(_uniform(2, *rest) for rest in ((64, 15, 16), (64, 30, 8), (32, 9, 16))),
    *(_uniform(3, *rest) for rest in ((64, 4, 16), (64, 8, 8), (128, 7, 16))),
]
"""Budgets of 3.0 and 3.5 bits per weight, and uniform settings within 1 % of them."""


def _sparse(model: str) -> list[ReferenceRow]:
    """What 2:4 and 4 bits lose, made up for under the inputs' mean squares (SLiM's metric) and under their full second moment; from codes
    that made up for nothing themselves (SLiM's setting), and from GPTQ's."""
    pruned, rows = prune(pattern="2:4"), []
    for quantizer, solvers in (("rtn", ("qera_approx", "qera_exact")), ("gptq", ("qera_approx", "qera_exact", "best"))):
        start = (pruned, quantize(4, quantizer))
        rows.append(ReferenceRow(f"2:4, {quantizer}, no factors", start, {"bits": "2:4 + 4", "rank": 0}, model))
        for method in solvers:
            stages = (*start, {"decompose": {"method": method, "rank": 32}})
            rows.append(ReferenceRow(f"2:4, {quantizer}, {method}", stages, {"bits": "2:4 + 4", "rank": 32}, model))
    return rows


DECOMPOSE = ReferenceTable(
    "Decomposition: presets against plain GPTQ, by total bits per weight",
    [
        *(_plain(bits, group, DEMO) for bits, group in ((3, 64), (3, 32), (4, 64), (2, 64), (2, 32))),
        *(_decomposed(preset, 3, rank, DEMO) for rank in (8, 32) for preset in (*PRESETS, "svdquant")),
        *(_decomposed(preset, 2, rank, DEMO) for rank in (8, 32) for preset in STRONGEST),
        *ALLOCATED,
        *_sparse(DEMO),
        *_sparse(SMALL),
        *(_plain(bits, group, SMALL) for bits in (2, 3, 4) for group in (64, 32)),
        *(
            _decomposed(preset, bits, rank, SMALL)
            for bits in (2, 3, 4)
            for rank in (4, 8, 16, 32, 64)
            for preset in (*PRESETS, *(("svdquant",) if bits == 4 else ()))
        ),
    ],
    ("bits", "rank"),
    panel="model",
)
