"""The rows of the tables of recovery: every method, pruned models, and the grid that trains."""

from collections.abc import Mapping

from .reference_rows import DEMO, SHORT, SHORT_NOTE, SMALL, ReferenceRow, ReferenceTable, Stage, prune, quantize

# -- recover ---------------------------------------------------------------------------------------------------------------------

KINDS: dict[str, tuple[Stage, ...]] = {
    "50 % pruned": (prune(),),
    "2:4": (prune(pattern="2:4"),),
    "3-bit": (quantize(3),),
    "2:4 + 4-bit": (prune(pattern="2:4"), quantize(4)),
    "LQ": (quantize(3), {"decompose": {"method": "qera_exact", "rank": 8}}),
}
_BUDGET = {DEMO: {"steps": 50, "batch_size": 4, "seq_len": 256}, SMALL: {"steps": 50, "batch_size": 8, "seq_len": 128}}
_FOUR: dict[str, dict[str, object]] = {
    "perp, norms": {"method": "perp", "biases": False},
    "perp, norms and biases": {"method": "perp"},
    "lora": {"method": "lora", "rank": 8, "norms": True},
    "dora": {"method": "dora", "rank": 8},
}
_GRID_FOUR = {**{k: v for k, v in _FOUR.items() if k != "perp, norms and biases"}, "scales, norms": {"method": "scales", "norms": True}}


def _recovered(name: str, kind: str, settings: Mapping[str, object], model: str, seed: int = 0) -> ReferenceRow:
    return ReferenceRow(name, (*KINDS[kind], {"recover": {**_BUDGET[model], **settings}}), {"kind": kind, "seed": seed}, model, seed)


_BEST = (quantize(3), {"decompose": {"method": "best", "rank": 32}})


def _untouched(kind: str, model: str) -> ReferenceRow:
    return ReferenceRow("not recovered", KINDS[kind], {"kind": kind, "seed": 0}, model)


def recover_rows() -> list[ReferenceRow]:
    from ...recover.recovery_methods import RECOVER

    small = [_untouched(kind, SMALL) for kind in KINDS]
    small += [_recovered(name, kind, {"method": name}, SMALL) for kind in KINDS for name in RECOVER]
    small += [_recovered(name, kind, settings, SMALL, 1) for kind in KINDS for name, settings in _GRID_FOUR.items()]
    demo = []
    for kind in ("50 % pruned", "3-bit", "LQ"):
        chosen = _FOUR if kind == "50 % pruned" else _GRID_FOUR
        demo += [_untouched(kind, DEMO), *(_recovered(name, kind, settings, DEMO) for name, settings in chosen.items())]
    tags = {"kind": "3-bit, best 32", "seed": 0}
    demo.append(ReferenceRow("not recovered", _BEST, tags))
    variants = {"lora": {}, "lora, scales": {"scales": True}, "lora, scales, biases": {"scales": True, "biases": True}}
    for name, own in variants.items():
        demo.append(ReferenceRow(name, (*_BEST, {"recover": {**_BUDGET[DEMO], **_FOUR["lora"], **own}}), tags))
    return [*small, *demo]


RECOVER_NOTE = "Every row trains on the same number of tokens, by distillation from the dense model."


# -- perp ------------------------------------------------------------------------------------------------------------------------

SUBSETS: dict[str, dict[str, object]] = {
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


def _perp_rows() -> list[ReferenceRow]:
    rows = []
    for sparsity in (0.3, 0.4, 0.5, 0.6, 0.7):
        start, tags = prune("magnitude", sparsity=sparsity), {"pattern": "unstructured", "pruned": f"{100 * sparsity:.0f} %"}
        rows.append(ReferenceRow("not recovered", (start,), tags, SMALL))
        rows += [ReferenceRow(name, (start, {"recover": {**_BUDGET[SMALL], **own}}), tags, SMALL) for name, own in SUBSETS.items()]
    half, pairs = {"pattern": "unstructured", "pruned": "50 %"}, {"pattern": "2:4", "pruned": "50 %"}
    rows.append(ReferenceRow("not recovered", (prune("magnitude"),), half))
    for name in ("norms", "norms and biases"):
        rows.append(
            ReferenceRow(f"{name}, 60 steps", (prune("magnitude"), {"recover": {**_BUDGET[DEMO], **SUBSETS[name], "steps": 60}}), half)
        )
    rows.append(ReferenceRow("not recovered", (prune(pattern="2:4"),), pairs))
    after = (prune(pattern="2:4"), _RECONSTRUCTED)
    rows.append(ReferenceRow("reconstruct mask_lora, 50 steps a block", after, pairs))
    trained = {"recover": {**_BUDGET[DEMO], **SUBSETS["mask_lora"]}}
    rows.append(ReferenceRow("… and mask_lora, 50 steps", (*after, trained), pairs))
    return rows


PERP = ReferenceTable(
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


def _trained(steps: int, method: str = "scales", **settings: object) -> Stage:
    return {"recover": {**_BUDGET[DEMO], "method": method, "norms": True, "steps": steps, **settings}}


def _auto_round(bits: int, length: int = 128) -> Mapping[str, object]:
    """Its default steps of 1,024 tokens on our calibration tokens in windows of `length`: of 128 they are as many as is its default."""
    windows = {"samples": 32 * 512 // length, "batch_size": 1024 // length}
    return {"program": "auto_round", "bits": bits, "group_size": 64, "iterations": 200, **windows}


def _grid_rows(bits: int) -> list[ReferenceRow]:
    start, tags = quantize(bits), {"bits": bits}
    rival = (quantize(bits, group_size=192), {"decompose": {"method": "best", "rank": 4}})
    rounded = (quantize(bits, "learned_rounding", **SHORT),)
    ours: dict[str, tuple[Stage, ...]] = {
        "gptq": (start,),
        "gptq, guided": (quantize(bits, guided=1),),
        "gptq, group 32": (quantize(bits, group_size=32),),
        "gptq, group 192, best rank 4": rival,
        "gptq, scales and norms 60": (start, _trained(60)),
        "learned_rounding": rounded,
        "learned_rounding, scales and norms 60": (*rounded, _trained(60)),
    }
    theirs: dict[str, tuple[Stage, ...]] = {"AutoRound": ()}
    if bits == 2:
        coarse = quantize(bits, "learned_rounding", **SHORT, matmul="medium")
        ours["learned_rounding, scales and norms 300, both losses"] = (coarse, _trained(300, loss="both", matmul="medium"))
    if bits == 3:
        whole = quantize(bits, "learned_rounding", matmul="medium")
        ours["gptq, scales and norms 60, both losses"] = (start, _trained(60, loss="both"))
        ours["learned_rounding, scales and norms 300"] = (*rounded, _trained(300))
        ours["learned_rounding, 100 × 2,048"] = (whole,)
        ours["learned_rounding, 100 × 2,048, scales and norms 60"] = (whole, _trained(60, matmul="medium"))
        ours["learned_rounding, 100 × 2,048, scales and norms 300, both losses"] = (whole, _trained(300, loss="both", matmul="medium"))
        ours["block_training"] = (quantize(bits, "block_training", **SHORT),)
        ours["gptq, norms 60"] = (start, _trained(60, "perp", biases=False))
        ours["gptq, group 192, best rank 4, factors and norms 60"] = (*rival, _trained(60, "lora", rank=4))
        theirs["AutoRound, scales and norms 60, both losses"] = (_trained(60, loss="both"),)
    if bits == 4:
        ours["learned_rounding, scales and norms 60, both losses"] = (*rounded, _trained(60, loss="both"))
    return [
        *(ReferenceRow(name, stages, tags) for name, stages in ours.items()),
        *(ReferenceRow(name, stages, tags, rival=_auto_round(bits)) for name, stages in theirs.items()),
        ReferenceRow("AutoRound, windows of 512", (), tags, rival=_auto_round(bits, 512)),
    ]


_COARSE_NOTE = (
    "learned_rounding of 100 steps of 2,048 tokens is its default; it, what is trained behind it and the 300 steps at 2 bits multiply with"
    " `matmul: medium`."
)
_LOSSES_NOTE = (
    "Both losses: half distillation, half cross-entropy with the text. That also teaches the text's kind: how much"
    " of it 60 steps teach the dense model's own norms, the last row says."
)
_RIVAL_NOTE = (
    "AutoRound 0.16.1: 200 steps of 1,024 tokens a block, asymmetric, group 64, its calibration 128 windows of 128 tokens of ours; in one row 32 of 512."
)
_DENSE = ReferenceRow("dense, norms 60, both losses", (_trained(60, "perp", biases=False, loss="both"),), {"bits": 32})
GRID = ReferenceTable(
    "Training what the quantizer stores, against spending bytes on groups, bits and factors",
    [*_grid_rows(3), *_grid_rows(2), *_grid_rows(4), _DENSE],
    ("bits",),
    panel="bits",
    notes=(
        "The number behind a method counts its steps of 1,024 tokens, trained by distillation from the dense model.",
        _LOSSES_NOTE,
        SHORT_NOTE,
        _COARSE_NOTE,
        _RIVAL_NOTE,
    ),
    other_text=True,
)
