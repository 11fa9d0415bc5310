"""What `make publish` measures: the rows of the reference tables, as data. Knows names and settings; `publishing` measures them.

A row is a model, the stages that lead to it in recipe form, and what identifies it in its table. Rows of one model share a run
directory, so a stage that many of them begin with is done once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Stage = Mapping[str, Mapping[str, Any]]

SMALL = "small"
DEMO = "demo"
SETTINGS: dict[str, dict[str, Any]] = {
    DEMO: {"calibration": {"samples": 32, "seq_len": 512}, "evaluation": {"seq_len": 512, "windows": 16}},
    SMALL: {"calibration": {"samples": 64, "seq_len": 128}, "evaluation": {"seq_len": 128, "windows": 64}},
}
"""Text of the rows, by model: the demo text, or that of tests/small_model."""


@dataclass(frozen=True)
class Row:
    """`tags` are columns that tell rows of one name apart: bits, rank, kind, seed."""

    name: str
    stages: tuple[Stage, ...]
    tags: Mapping[str, Any] = field(default_factory=dict)
    model: str = DEMO
    seed: int = 0
    budget: str | None = None
    rival: Mapping[str, Any] | None = None
    """What another program quantizes first (`rivals.made`); the stages begin at its checkpoint."""


@dataclass(frozen=True)
class Table:
    """`tags` in the order of the columns; `panel` and `series` say how the figure is drawn."""

    title: str
    rows: Sequence[Row]
    tags: tuple[str, ...]
    panel: str | None = None
    x: str = "bits_per_weight"
    notes: tuple[str, ...] = ()
    lines: bool = False
    """Draw a line for each series instead of points and the Pareto line."""
    within: tuple[str, ...] = ()
    """Rows that differ in one of these tags do not compete for bytes."""
    other_text: bool = False
    """Measure on text of another kind too, so that an adaptation to the training text is told from a recovery."""


def _quantize(bits: int, method: str = "gptq", **settings: Any) -> Stage:
    size = "block_size" if method in ("normal_float", "gptq_nf", "nf4") else "group_size"
    return {"quantize": {"method": method, "bits": bits, size: 64, **settings}}


def _prune(method: str = "wanda", pattern: str = "unstructured", sparsity: float = 0.5) -> Stage:
    return {"prune": {"method": method, "sparsity": sparsity, "pattern": pattern}}


# -- compress --------------------------------------------------------------------------------------------------------------------


_SHORT = {"steps": 50, "batch_size": 2}
"""Of the methods that train a block: a quarter of their default, so that a row takes minutes."""
_SHORT_NOTE = "block_training and learned_rounding: 50 steps of 1,024 tokens a block, a quarter of their default."


def _grids(bits: int) -> list[Row]:
    named: dict[str, Stage] = {
        "rtn": _quantize(bits, "rtn"),
        "rtn, clip hessian": _quantize(bits, "rtn", clip="hessian"),
        "normal_float": _quantize(bits, "normal_float"),
        "gptq, clip power": _quantize(bits, clip="power"),
        "gptq, clip hessian": _quantize(bits, clip="hessian"),
        "gptq_nf": _quantize(bits, "gptq_nf"),
    }
    if bits < 4:
        named |= {
            "gptq, clip joint": _quantize(bits, clip="joint"),
            "gptq, clip hessian, correction 0.5": _quantize(bits, clip="hessian", correction=0.5),
            "gptq, clip hessian, first order 0.25": _quantize(bits, clip="hessian", first_order=0.25),
            "gptq, clip hessian, refit 0.5": _quantize(bits, clip="hessian", refit=0.5),
        }
    if bits == 3:
        named |= {name: _quantize(bits, name, **_SHORT) for name in ("block_training", "learned_rounding")}
    return [Row(name, (stage,), {"bits": bits}) for name, stage in named.items()]


def _masks(pattern: str, shown: str) -> list[Row]:
    return [Row(method, (_prune(method, pattern),), {"bits": shown}) for method in ("magnitude", "wanda", "sparsegpt")]


COMPRESS = Table(
    "Pruning and quantization of the demo model",
    [*_masks("unstructured", "50 %"), *_masks("2:4", "2:4"), *_grids(3), *_grids(4), *_grids(2)],
    ("bits",),
    panel="bits",
    notes=(_SHORT_NOTE,),
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


def _decomposed(preset: str, bits: int, rank: int, model: str) -> Row:
    tags = {"bits": bits, "rank": rank}
    if preset == "svdquant":
        return Row(preset, ({"decompose": {"method": preset, "bits": bits, "rank": rank}},), tags, model)
    method, quantizer = PRESETS[preset]
    return Row(preset, (_quantize(bits, quantizer), {"decompose": {"method": method, "rank": rank}}), tags, model)


def _plain(bits: int, group_size: int, model: str) -> Row:
    return Row(f"gptq, group {group_size}, no factors", (_quantize(bits, group_size=group_size),), {"bits": bits, "rank": 0}, model)


def _uniform(bits: int, group_size: int, rank: int, factor_bits: int) -> Row:
    """GPTQ and the exact step with one setting for all matrices: what an allocation of as many bytes has to beat."""
    stages = (_quantize(bits, group_size=group_size), {"decompose": {"method": "eora", "rank": rank, "factor_bits": factor_bits}})
    return Row(f"eora, group {group_size}, {factor_bits}-bit factors", stages, {"bits": bits, "rank": rank})


def _allocated(budget: str) -> Row:
    stages = (_quantize(3), {"decompose": {"method": "eora"}})
    return Row(f"gptq and eora, allocated {budget}", stages, {"bits": "mixed", "rank": "mixed"}, budget=budget)


ALLOCATED = [
    *(_allocated(budget) for budget in ("3.0bpw", "3.5bpw")),
    *(_uniform(2, *rest) for rest in ((64, 15, 16), (64, 30, 8), (32, 9, 16))),
    *(_uniform(3, *rest) for rest in ((64, 4, 16), (64, 8, 8), (128, 7, 16))),
]
"""Budgets of 3.0 and 3.5 bits per weight, and uniform settings within 1 % of them."""


def _sparse(model: str) -> list[Row]:
    """What 2:4 and 4 bits lose, made up for under the inputs' mean squares (SLiM's metric) and under their full second moment; from codes
    that made up for nothing themselves (SLiM's setting), and from GPTQ's."""
    pruned, rows = _prune(pattern="2:4"), []
    for quantizer, solvers in (("rtn", ("qera_approx", "qera_exact")), ("gptq", ("qera_approx", "qera_exact", "best"))):
        start = (pruned, _quantize(4, quantizer))
        rows.append(Row(f"2:4, {quantizer}, no factors", start, {"bits": "2:4 + 4", "rank": 0}, model))
        for method in solvers:
            stages = (*start, {"decompose": {"method": method, "rank": 32}})
            rows.append(Row(f"2:4, {quantizer}, {method}", stages, {"bits": "2:4 + 4", "rank": 32}, model))
    return rows


DECOMPOSE = Table(
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

# -- recover ---------------------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Stage, ...]] = {
    "50 % pruned": (_prune(),),
    "2:4": (_prune(pattern="2:4"),),
    "3-bit": (_quantize(3),),
    "2:4 + 4-bit": (_prune(pattern="2:4"), _quantize(4)),
    "LQ": (_quantize(3), {"decompose": {"method": "qera_exact", "rank": 8}}),
}
_BUDGET = {DEMO: {"steps": 50, "batch_size": 4, "seq_len": 256}, SMALL: {"steps": 50, "batch_size": 8, "seq_len": 128}}
_FOUR: dict[str, dict[str, Any]] = {
    "perp, norms": {"method": "perp", "biases": False},
    "perp, norms and biases": {"method": "perp"},
    "lora": {"method": "lora", "rank": 8, "norms": True},
    "dora": {"method": "dora", "rank": 8},
}
_GRID_FOUR = {**{k: v for k, v in _FOUR.items() if k != "perp, norms and biases"}, "scales, norms": {"method": "scales", "norms": True}}


def _recovered(name: str, kind: str, settings: Mapping[str, Any], model: str, seed: int = 0) -> Row:
    return Row(name, (*KINDS[kind], {"recover": {**_BUDGET[model], **settings}}), {"kind": kind, "seed": seed}, model, seed)


_BEST = (_quantize(3), {"decompose": {"method": "best", "rank": 32}})


def _untouched(kind: str, model: str) -> Row:
    return Row("not recovered", KINDS[kind], {"kind": kind, "seed": 0}, model)


def _recover_rows() -> list[Row]:
    from ..recover.methods import RECOVER

    small = [_untouched(kind, SMALL) for kind in KINDS]
    small += [_recovered(name, kind, {"method": name}, SMALL) for kind in KINDS for name in RECOVER]
    small += [_recovered(name, kind, settings, SMALL, 1) for kind in KINDS for name, settings in _GRID_FOUR.items()]
    demo = []
    for kind in ("50 % pruned", "3-bit", "LQ"):
        chosen = _FOUR if kind == "50 % pruned" else _GRID_FOUR
        demo += [_untouched(kind, DEMO), *(_recovered(name, kind, settings, DEMO) for name, settings in chosen.items())]
    tags = {"kind": "3-bit, best 32", "seed": 0}
    demo.append(Row("not recovered", _BEST, tags))
    beside = {"lora": {}, "lora, scales": {"scales": True}, "lora, scales, biases": {"scales": True, "biases": True}}
    for name, own in beside.items():
        demo.append(Row(name, (*_BEST, {"recover": {**_BUDGET[DEMO], **_FOUR["lora"], **own}}), tags))
    return [*small, *demo]


RECOVER_NOTE = "Every row trains on the same number of tokens, by distillation from the dense model."


# -- perp ------------------------------------------------------------------------------------------------------------------------

SUBSETS: dict[str, dict[str, Any]] = {
    "norms": {"method": "perp", "biases": False},
    "biases": {"method": "perp", "norms": False},
    "norms and biases": {"method": "perp"},
    "norms, biases, head": {"method": "perp", "head": True},
    "mask_lora": {"method": "perp", "norms": False, "biases": False, "lora": "mask_lora"},
    "scale_lora": {"method": "perp", "norms": False, "biases": False, "lora": "scale_lora"},
    "norms, biases, mask_lora": {"method": "perp", "lora": "mask_lora"},
    "all weights": {"method": "full"},
}
_RECONSTRUCTED = {"recover": {"method": "reconstruct", "train": "mask_lora", "steps": 50}}


def _perp_rows() -> list[Row]:
    rows = []
    for sparsity in (0.3, 0.4, 0.5, 0.6, 0.7):
        start, tags = _prune("magnitude", sparsity=sparsity), {"pattern": "unstructured", "pruned": f"{100 * sparsity:.0f} %"}
        rows.append(Row("not recovered", (start,), tags, SMALL))
        rows += [Row(name, (start, {"recover": {**_BUDGET[SMALL], **own}}), tags, SMALL) for name, own in SUBSETS.items()]
    half, pairs = {"pattern": "unstructured", "pruned": "50 %"}, {"pattern": "2:4", "pruned": "50 %"}
    rows.append(Row("not recovered", (_prune("magnitude"),), half))
    for name in ("norms", "norms and biases"):
        rows.append(Row(f"{name}, 60 steps", (_prune("magnitude"), {"recover": {**_BUDGET[DEMO], **SUBSETS[name], "steps": 60}}), half))
    rows.append(Row("not recovered", (_prune(pattern="2:4"),), pairs))
    after = (_prune(pattern="2:4"), _RECONSTRUCTED)
    rows.append(Row("reconstruct mask_lora, 50 steps a block", after, pairs))
    trained = {"recover": {**_BUDGET[DEMO], **SUBSETS["mask_lora"]}}
    rows.append(Row("… and mask_lora, 50 steps", (*after, trained), pairs))
    return rows


PERP = Table(
    "Recovery of pruned models: perplexity by sparsity and by what is trained (PERP, figure 1)",
    _perp_rows(),
    ("pattern", "pruned"),
    panel="model",
    x="sparsity",
    within=("pattern", "pruned"),
    lines=True,
    notes=(
        "Magnitude pruning; the demo model's 2:4 mask is Wanda's.",
        "By distillation from the dense model, 1,024 tokens a step: the small model 50 steps, the demo model as its rows say.",
    ),
)


# -- grid ------------------------------------------------------------------------------------------------------------------------


def _trained(steps: int, method: str = "scales", **settings: Any) -> Stage:
    return {"recover": {**_BUDGET[DEMO], "method": method, "norms": True, "steps": steps, **settings}}


def _auto_round(bits: int) -> Mapping[str, Any]:
    """Its default steps on as many samples as are its default, cut from our calibration tokens; 1,024 tokens a step."""
    return {"program": "auto_round", "bits": bits, "group_size": 64, "iterations": 200, "samples": 128, "batch_size": 8}


def _grid_rows(bits: int) -> list[Row]:
    start, tags = _quantize(bits), {"bits": bits}
    rival = (_quantize(bits, group_size=192), {"decompose": {"method": "best", "rank": 4}})
    rounded = (_quantize(bits, "learned_rounding", **_SHORT),)
    ours: dict[str, tuple[Stage, ...]] = {
        "gptq": (start,),
        "gptq, group 32": (_quantize(bits, group_size=32),),
        "gptq, group 192, best rank 4": rival,
        "gptq, scales and norms 60": (start, _trained(60)),
        "learned_rounding": rounded,
        "learned_rounding, scales and norms 60": (*rounded, _trained(60)),
    }
    theirs: dict[str, tuple[Stage, ...]] = {"AutoRound": ()}
    if bits < 4:
        ours["learned_rounding, scales and norms 300"] = (*rounded, _trained(300))
    if bits == 3:
        whole = _quantize(bits, "learned_rounding", matmul="medium")
        ours["learned_rounding, 100 × 2,048"] = (whole,)
        ours["learned_rounding, 100 × 2,048, scales and norms 60"] = (whole, _trained(60, matmul="medium"))
        ours["block_training"] = (_quantize(bits, "block_training", **_SHORT),)
        ours["gptq, norms 60"] = (start, _trained(60, "perp", biases=False))
        ours["gptq, group 192, best rank 4, factors and norms 60"] = (*rival, _trained(60, "lora", rank=4))
        theirs["AutoRound, scales and norms 60"] = (_trained(60),)
    return [
        *(Row(name, stages, tags) for name, stages in ours.items()),
        *(Row(name, stages, tags, rival=_auto_round(bits)) for name, stages in theirs.items()),
    ]


_COARSE_NOTE = "learned_rounding of 100 steps of 2,048 tokens is its default; it and the 60 steps behind it multiply with `matmul: medium`."
_RIVAL_NOTE = (
    "AutoRound 0.16.1: 200 steps of 1,024 tokens a block, asymmetric, group 64, its calibration 128 windows of 128 tokens of ours."
)
GRID = Table(
    "Training what the quantizer stores, against spending bytes on groups, bits and factors",
    [*_grid_rows(3), *_grid_rows(2), *_grid_rows(4)],
    ("bits",),
    panel="bits",
    notes=(
        "The number behind a method counts its steps of 1,024 tokens, trained by distillation from the dense model.",
        _SHORT_NOTE,
        _COARSE_NOTE,
        _RIVAL_NOTE,
    ),
    other_text=True,
)


def tables() -> dict[str, Table]:
    """All reference tables by name; `recover` reads its methods from their registry."""
    recover = Table(
        "Recovery: every method on every kind of compressed model",
        _recover_rows(),
        ("kind", "seed"),
        panel="kind",
        within=("kind",),
        notes=(RECOVER_NOTE,),
    )
    return {"compress": COMPRESS, "decompose": DECOMPOSE, "recover": recover, "perp": PERP, "grid": GRID}
