"""The recovery methods by name: a literal dict, one row a method.

A row says what trains, what a run may expect (masks, grids, merging), and what it refuses, before any work.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from . import attach as methods
from . import bottlenecks, deltas, increments, prompts, refusals
from .compressed_linear import CompressedLinear
from .compressed_model import compressed_linears
from .fits import misfit
from .reconstruct import TRAINS, Reconstruct, attach_part, resolved
from .site import AttachSite, Gradients, kinds, site_of
from .trainable import Attached
from .training_run import TrainConfig


@dataclass(frozen=True)
class Ways:
    """Where a trained method goes: into the artifact, onto the kernels, into other programs' formats, and what it merges into exactly
    ("refused" where it cannot)."""

    stored_as: str
    fused_as: str
    exports_as: str
    merges_into: str


@dataclass(frozen=True)
class RecoveryMethod:
    """config: what a recipe writes for the stage, a subclass of TrainConfig where it trains the whole model. main: the kind of parameter
    that `learning_rate` means (trainable.RATES has the defaults). mask_safe: masked weights stay exactly 0. grid_safe: codes stay.
    paper: its name and arXiv id, empty where there is none; departs: where it is not what its paper has.
    serves(kinds, config) → why it cannot, or None; kinds are those of `site.kinds`. by_block: trained block by block
    (`reconstruct`), with a config that is all its own."""

    config: type[TrainConfig] | type[Reconstruct]
    attach: Callable[[AttachSite, Any], Attached]
    main: str
    trains: str
    ways: Ways
    mask_safe: bool = True
    grid_safe: bool = True
    serves: refusals.Refusal = refusals.nothing
    needs: frozenset[str] = frozenset()
    departs: str = ""
    version: int = 1
    by_block: bool = False
    paper: str = ""


def _reconstruct(kinds: frozenset[str], config: Reconstruct) -> str | None:
    if config.train == "weights" and refusals.quantized(kinds):
        return "the weights are quantized: choose train=scales or lora, or quantize with block_training"
    name, own, _ = TRAINS[resolved(config, kinds).train]
    return RECOVER[name].serves(kinds, own(config))


_PAIR = Ways(
    "low-rank pair",
    "low-rank term",
    "added into dense weights, or base in any format + PEFT LoRA",
    "dense unmasked weights; elsewhere refused",
)
_MODEL = Ways(
    "norms, biases, weights in place", "as it was stored", "any format; created biases where the architecture has a place", "in place"
)
_DELTA = Ways(
    "in dense weights; sparse delta next to quantized ones",
    "a dense matrix where a delta is",
    "dense; other formats refused with a delta",
    "kept dense weights; refused on quantized ones",
)
_BOTTLENECKS = Ways("bottlenecks stored with the model", "run next to the kernels", "refused: no format has a place for them", "refused")
_TOKENS = Ways("virtual tokens stored with the model", "in front of the kernels", "base in any format + PEFT prompt", "refused")
_GRID = Ways("scales and codes in place", "as it was stored", "any grid format", "in place")

RECOVER: dict[str, RecoveryMethod] = {
    "lora": RecoveryMethod(
        methods.Lora, methods.lora, "factors", "up·down", _PAIR, serves=refusals.lora, version=3, paper="LoRA, arXiv:2106.09685"
    ),
    "perp": RecoveryMethod(
        methods.Perp,
        methods.perp,
        "norms",
        "norms, biases, head, embeddings, pairs under the mask",
        _MODEL,
        serves=refusals.perp,
        version=2,
        paper="PERP, arXiv:2312.15230",
    ),
    "scales": RecoveryMethod(
        methods.Scales,
        methods.scales,
        "scales",
        "group scales (and zeros, norms, biases, factors)",
        _GRID,
        serves=refusals.scales,
        version=3,
        paper="PEQA, arXiv:2305.14152",
    ),
    "bitfit": RecoveryMethod(methods.BitFit, methods.bitfit, "biases", "biases", _MODEL, version=2, paper="BitFit, arXiv:2106.10199"),
    "full": RecoveryMethod(methods.Full, methods.full, "dense", "every weight under the mask", _MODEL, serves=refusals.full, version=4),
    "qat": RecoveryMethod(
        methods.Qat,
        methods.qat,
        "codes",
        "codes on the held grid, straight-through",
        _GRID,
        grid_safe=False,
        serves=refusals.needs_grid,
        version=2,
    ),
    "dora": RecoveryMethod(
        methods.Dora,
        methods.dora,
        "factors",
        "up·down and row magnitudes",
        Ways(
            "magnitudes in the scales and in up",
            "low-rank term",
            "added into dense weights, or rescaled base in any format + PEFT LoRA",
            "scales or dense rows",
        ),
        version=3,
        paper="DoRA, arXiv:2402.09353",
    ),
    "qa_lora": RecoveryMethod(
        methods.QaLora,
        methods.qa_lora,
        "factors",
        "a pair on group sums",
        Ways("float32 zero points", "kernels with float zeros", "dense; other formats refused", "zero points"),
        mask_safe=False,
        serves=refusals.qa_lora,
        paper="QA-LoRA, arXiv:2309.14717",
    ),
    "svft": RecoveryMethod(
        methods.Svft,
        methods.svft,
        "spectrum",
        "a sparse matrix between singular vectors",
        _PAIR,
        serves=refusals.svft,
        paper="SVFT, arXiv:2405.19597",
    ),
    "qlora": RecoveryMethod(
        methods.Lora,
        methods.lora,
        "factors",
        "up·down on a quantized base",
        _PAIR,
        serves=refusals.qlora,
        version=3,
        paper="QLoRA, arXiv:2305.14314",
    ),
    "lq_lora": RecoveryMethod(
        methods.Lora,
        methods.lora,
        "factors",
        "the factors of lq_lora's decomposition",
        _PAIR,
        serves=refusals.from_decomposition,
        version=3,
        paper="LQ-LoRA, arXiv:2311.12023",
    ),
    "loftq": RecoveryMethod(
        methods.Lora,
        methods.lora,
        "factors",
        "the factors of loftq's decomposition",
        _PAIR,
        serves=refusals.from_decomposition,
        version=3,
        paper="LoftQ, arXiv:2310.08659",
    ),
    "dequantize_train_requantize": RecoveryMethod(
        methods.DequantizeTrainRequantize,
        methods.dequantize_train_requantize,
        "dense",
        "every weight, rounded anew at the end by GPTQ",
        Ways("fresh codes and scales", "as it was stored", "any grid format", "in place"),
        grid_safe=False,
        serves=refusals.needs_grid,
        needs=frozenset({"second_moment"}),
        version=5,
    ),
    "lota": RecoveryMethod(
        increments.Lota,
        increments.lota,
        "ternary",
        "ternary increments of the codes",
        _GRID,
        grid_safe=False,
        serves=refusals.needs_uniform,
        departs="LoTA-QAF without its offset matrices",
        version=2,
        paper="LoTA-QAF, arXiv:2505.18724",
    ),
    "lr_qat": RecoveryMethod(
        increments.LrQat,
        increments.lr_qat,
        "codes",
        "low rank inside the rounding, group scales",
        _GRID,
        grid_safe=False,
        serves=refusals.needs_uniform,
        version=3,
        paper="LR-QAT, arXiv:2406.06385",
    ),
    "pafi": RecoveryMethod(
        deltas.Pafi, deltas.pafi, "sparse", "the smallest kept weights", _DELTA, version=3, paper="PaFi, arXiv:2305.16742"
    ),
    "fish_mask": RecoveryMethod(
        deltas.FishMask,
        deltas.fish_mask,
        "sparse",
        "the most informative kept weights",
        _DELTA,
        needs=frozenset({"fisher"}),
        departs="FishDip's re-estimation is a swap: the weights that moved least give way, their number stays",
        version=2,
        paper="FishMask, arXiv:2111.09839",
    ),
    "diff_pruning": RecoveryMethod(
        deltas.DiffPruning,
        deltas.diff_pruning,
        "sparse",
        "a sparse delta with learned gates",
        _DELTA,
        serves=refusals.diff_pruning,
        version=3,
        paper="arXiv:2012.07463",
    ),
    "reconstruct": RecoveryMethod(
        Reconstruct,
        attach_part,
        "factors",
        "what `train` names, block by block towards the dense block's output",
        Ways("as what it trains", "as it was stored", "as what it trains", "as what it trains"),
        serves=_reconstruct,
        version=5,
        by_block=True,
        paper="PERP, arXiv:2312.15230",
    ),
    "serial_adapter": RecoveryMethod(
        bottlenecks.SerialAdapter, bottlenecks.serial_adapter, "adapters", "bottlenecks behind sublayers", _BOTTLENECKS, paper="arXiv:1902.00751"
    ),
    "parallel_adapter": RecoveryMethod(
        bottlenecks.ParallelAdapter,
        bottlenecks.parallel_adapter,
        "adapters",
        "bottlenecks in parallel to sublayers",
        _BOTTLENECKS,
        paper="arXiv:2110.04366",
    ),
    "mam_adapter": RecoveryMethod(
        prompts.MamAdapter, prompts.mam_adapter, "adapters", "a prefix and parallel bottlenecks", _BOTTLENECKS, paper="arXiv:2110.04366"
    ),
    "prefix_tuning": RecoveryMethod(
        prompts.PrefixTuning, prompts.prefix_tuning, "tokens", "keys and values in front", _TOKENS, paper="arXiv:2101.00190"
    ),
    "prompt_tuning": RecoveryMethod(
        prompts.PromptTuning, prompts.prompt_tuning, "tokens", "input embeddings in front", _TOKENS, paper="arXiv:2104.08691"
    ),
    "p_tuning": RecoveryMethod(
        prompts.PTuning, prompts.p_tuning, "tokens", "a network that makes input embeddings", _TOKENS, paper="arXiv:2103.10385"
    ),
}


def config_of(name: str, settings: Any) -> Any:
    """The method's config with these settings (a mapping, all else its default), or the config that it is given. ValueError, with the
    nearest known name, for an unknown method or setting."""
    if name not in RECOVER:
        raise ValueError(f"unknown recovery method {name!r}{_nearest(name, RECOVER)}; known are {', '.join(RECOVER)}")
    config = RECOVER[name].config
    if isinstance(settings, config):
        return settings
    known = {f.name for f in fields(config)}
    for key in settings:
        if key not in known:
            raise ValueError(f"{name} has no setting {key!r}{_nearest(key, known)}")
    return config(**settings)


def _nearest(word: str, known: Iterable[str]) -> str:
    result = difflib.get_close_matches(word, list(known), 1)
    return f" (nearest is {result[0]!r})" if result else ""


def refusal(name: str, result: Iterable[frozenset[str]], config: object) -> str | None:
    """Why a method cannot serve a compressed model, before any work; None when it can. `result` are the kinds of the chosen records."""
    config, union = config_of(name, config), frozenset().union(*result)
    reason = RECOVER[name].serves(union, config)
    return None if reason is None else f"{name} cannot serve this model: {reason}"


def attach(name: str, model: nn.Module, config: Any, *, seed: int = 0, gradients: Gradients | None = None) -> Attached:
    """Put a method on a model whose compressed linears are installed. ValueError for a refusal or when nothing is left to train."""
    config = config_of(name, config)
    linears = compressed_linears(model)
    reason = misfit(config, model, {n: lin.stored.shape for n, lin in linears.items()}, low_rank_of(linears))
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    site = site_of(model, config.targets, config.layers, seed, config.steps, gradients)
    row = RECOVER[name]
    if "fisher" in row.needs and gradients is None:
        raise ValueError(f"{name} selects by gradients: pass `gradients`")
    reason = refusal(name, [kinds(linear.stored) for linear in site.linears.values()], config)
    if reason is not None:
        raise ValueError(reason)
    attached = row.attach(site, config)
    if not attached.trainables:
        raise ValueError(f"{name}: targets {config.targets!r} and layers {config.layers!r} leave no trainable parameter")
    return attached


def low_rank_of(linears: Mapping[str, CompressedLinear]) -> frozenset[str]:
    return frozenset(name for name, linear in linears.items() if linear.stored.low_rank is not None)
