"""The recovery methods by name: a literal dict, one row a method.

A row says what trains, what a run may expect (masks, grids, merging), and what it refuses, before any work.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, make_dataclass
from dataclasses import field as dataclass_field
from typing import Any

from torch import nn

from . import attach as methods
from . import bottlenecks, deltas, increments, prompts
from .compressed_linear import CompressedLinear
from .compressed_model import compressed_linears
from .fits import misfit
from .reconstruct import TRAINS, Reconstruct, attach_part, resolved
from .site import AttachSite, Gradients, kinds, site_of
from .trainable import Attached
from .training_run import TrainConfig

Refusal = Callable[[frozenset[str], Any], str | None]


def _anything(kinds: frozenset[str], config: object) -> str | None:
    return None


def flat(own: type) -> type:
    """One frozen dataclass with the fields of TrainConfig and those of a method: what a recipe writes for the stage."""
    parts = [(f.name, f.type, _copy(f)) for source in (TrainConfig, own) for f in fields(source)]
    made = make_dataclass(own.__name__, parts, frozen=True)
    made.__doc__, made.__module__ = own.__doc__, own.__module__
    return made


def _copy(field: Field[Any]) -> Any:
    return (
        dataclass_field(default=field.default) if field.default is not MISSING else dataclass_field(default_factory=field.default_factory)
    )  # type: ignore[arg-type]


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
    """`own` is the method's own config and `config` that with TrainConfig's fields in one flat dataclass. main: the kind of parameter
    that `learning_rate` means (trainable.RATES has the defaults). mask_safe: masked weights stay exactly 0. grid_safe: codes stay.
    paper: its name and arXiv id, empty where there is none; departs: where it is not what its paper has.
    serves(kinds, own config) → why it cannot, or None; kinds are those of `site.kinds`. by_block: trained block by block
    (`reconstruct`), with a config that is all its own."""

    own: type
    attach: Callable[[AttachSite, Any], Attached]
    main: str
    trains: str
    ways: Ways
    mask_safe: bool = True
    grid_safe: bool = True
    serves: Refusal = _anything
    needs: frozenset[str] = frozenset()
    departs: str = ""
    version: int = 1
    by_block: bool = False
    paper: str = ""

    @property
    def config(self) -> type:
        return self.own if self.by_block else _FLAT[self.own]


def quantized(kinds: frozenset[str]) -> bool:
    return bool(kinds & {"uniform", "normal_float", "ggml"})


def _needs_grid(kinds: frozenset[str], config: object) -> str | None:
    return (
        None
        if "dense" not in kinds
        else "it trains a grid, and some of the chosen linears are dense: quantize first, or choose lora, perp or full"
    )


def _scales(kinds: frozenset[str], config: methods.Scales) -> str | None:
    if config.zeros and "normal_float" in kinds:
        return "a NormalFloat weight has no zero points: set zeros=false"
    if config.zeros and "ggml" in kinds:
        return "the types of GGUF have no zero points, and their minima train with the scales: set zeros=false"
    return None if config.scales == "auto" and quantized(kinds) else _needs_grid(kinds, config)


def _full(kinds: frozenset[str], config: object) -> str | None:
    return "the weights are quantized: choose qat (grid held) or dequantize_train_requantize" if quantized(kinds) else None


def _perp(kinds: frozenset[str], config: methods.Perp) -> str | None:
    if config.lora != "none" and quantized(kinds):
        return f"{config.lora} merges into dense weights; on a quantized base use lora, or perp with lora=none"
    return None


def _qa_lora(kinds: frozenset[str], config: object) -> str | None:
    if "masked" in kinds:
        return "float zero points move masked weights off 0: choose scales or lora for a pruned model"
    return "it merges into the zero points of a uniform grid" if kinds & {"dense", "normal_float", "ggml"} else None


def _needs_uniform(kinds: frozenset[str], config: object) -> str | None:
    return (
        "its increments are whole steps of a uniform grid, which NormalFloat and the types of GGUF have not"
        if kinds & {"normal_float", "ggml"}
        else _needs_grid(kinds, config)
    )


def _diff_pruning(kinds: frozenset[str], config: object) -> str | None:
    return "its delta sees the raw input, and this base rounds its own: choose pafi or fish_mask" if "activations" in kinds else None


def _lora(kinds: frozenset[str], config: methods.Lora) -> str | None:
    if config.scales is True and "dense" in kinds:
        return "scales=true trains a grid, and some of the chosen linears are dense: set scales=auto"
    return None


def _qlora(kinds: frozenset[str], config: methods.Lora) -> str | None:
    return _lora(kinds, config) if quantized(kinds) else "it is LoRA on a quantized base, and nothing is quantized: choose lora"


def _from_decomposition(kinds: frozenset[str], config: methods.Lora) -> str | None:
    if "low_rank" in kinds:
        return _lora(kinds, config)
    return "it trains the factors of a decomposition, and there are none: put a decompose stage before it, or choose qlora"


def _reconstruct(kinds: frozenset[str], config: Reconstruct) -> str | None:
    if config.train == "weights" and quantized(kinds):
        return "the weights are quantized: choose train=scales or lora, or quantize with block_training"
    name, own, _ = TRAINS[resolved(config, kinds).train]
    return RECOVER[name].serves(kinds, own(config))


def _svft(kinds: frozenset[str], config: object) -> str | None:
    if "quantized_factors" not in kinds:
        return None
    return (
        "its term is stacked onto factors that are (or may come to be) on a grid: choose lora or scales, or decompose with factor_bits=16"
    )


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
        methods.Lora, methods.lora, "factors", "up·down", _PAIR, serves=_lora, version=3, paper="LoRA, arXiv:2106.09685"
    ),
    "perp": RecoveryMethod(
        methods.Perp,
        methods.perp,
        "norms",
        "norms, biases, head, embeddings, pairs under the mask",
        _MODEL,
        serves=_perp,
        version=2,
        paper="PERP, arXiv:2312.15230",
    ),
    "scales": RecoveryMethod(
        methods.Scales,
        methods.scales,
        "scales",
        "group scales (and zeros, norms, biases, factors)",
        _GRID,
        serves=_scales,
        version=3,
        paper="PEQA, arXiv:2305.14152",
    ),
    "bitfit": RecoveryMethod(methods.BitFit, methods.bitfit, "biases", "biases", _MODEL, version=2, paper="BitFit, arXiv:2106.10199"),
    "full": RecoveryMethod(methods.Full, methods.full, "dense", "every weight under the mask", _MODEL, serves=_full, version=4),
    "qat": RecoveryMethod(
        methods.Qat,
        methods.qat,
        "codes",
        "codes on the held grid, straight-through",
        _GRID,
        grid_safe=False,
        serves=_needs_grid,
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
        serves=_qa_lora,
        paper="QA-LoRA, arXiv:2309.14717",
    ),
    "svft": RecoveryMethod(
        methods.Svft,
        methods.svft,
        "spectrum",
        "a sparse matrix between singular vectors",
        _PAIR,
        serves=_svft,
        paper="SVFT, arXiv:2405.19597",
    ),
    "qlora": RecoveryMethod(
        methods.Lora,
        methods.lora,
        "factors",
        "up·down on a quantized base",
        _PAIR,
        serves=_qlora,
        version=3,
        paper="QLoRA, arXiv:2305.14314",
    ),
    "lq_lora": RecoveryMethod(
        methods.Lora,
        methods.lora,
        "factors",
        "the factors of lq_lora's decomposition",
        _PAIR,
        serves=_from_decomposition,
        version=3,
        paper="LQ-LoRA, arXiv:2311.12023",
    ),
    "loftq": RecoveryMethod(
        methods.Lora,
        methods.lora,
        "factors",
        "the factors of loftq's decomposition",
        _PAIR,
        serves=_from_decomposition,
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
        serves=_needs_grid,
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
        serves=_needs_uniform,
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
        serves=_needs_uniform,
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
        serves=_diff_pruning,
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
_FLAT: dict[type, type] = {}
_FLAT.update({row.own: flat(row.own) for row in RECOVER.values() if not row.by_block})


def split(name: str, config: Any) -> tuple[Any, Any]:
    """A flat config (or a mapping of its fields) as (TrainConfig, the method's own); a method that trains block by block has one config for
    both. ValueError, with the nearest known name, for an unknown method or field."""
    if name not in RECOVER:
        raise ValueError(f"unknown recovery method {name!r}{_nearest(name, RECOVER)}; known are {', '.join(RECOVER)}")
    own = RECOVER[name].own
    values = dict(config) if isinstance(config, Mapping) else {f.name: getattr(config, f.name) for f in fields(config)}
    shared, mine = {f.name for f in fields(TrainConfig)}, {f.name for f in fields(own)}
    shared = set() if RECOVER[name].by_block else shared
    for key in values:
        if key not in shared | mine:
            raise ValueError(f"{name} has no setting {key!r}{_nearest(key, shared | mine)}")
    mine_only = own(**{k: v for k, v in values.items() if k in mine})
    return (TrainConfig(**{k: v for k, v in values.items() if k in shared}) if shared else mine_only), mine_only


def _nearest(word: str, known: Iterable[str]) -> str:
    result = difflib.get_close_matches(word, list(known), 1)
    return f" (nearest is {result[0]!r})" if result else ""


def refusal(name: str, result: Iterable[frozenset[str]], config: object) -> str | None:
    """Why a method cannot serve a compressed model, before any work; None when it can. `found` are the kinds of the chosen records."""
    _, own = split(name, config)
    union = frozenset().union(*result)
    reason = RECOVER[name].serves(union, own)
    return None if reason is None else f"{name} cannot serve this model: {reason}"


def attach(name: str, model: nn.Module, config: object, *, seed: int = 0, gradients: Gradients | None = None) -> Attached:
    """Put a method on a model whose compressed linears are installed. ValueError for a refusal or when nothing is left to train."""
    shared, own = split(name, config)
    linears = compressed_linears(model)
    reason = misfit(own, shared, model, {n: lin.stored.shape for n, lin in linears.items()}, low_rank_of(linears))
    if reason is not None:
        raise ValueError(f"{name}: {reason}")
    site = site_of(model, shared.targets, shared.layers, seed, shared.steps, gradients)
    row = RECOVER[name]
    if "fisher" in row.needs and gradients is None:
        raise ValueError(f"{name} selects by gradients: pass `gradients`")
    reason = refusal(name, [kinds(linear.stored) for linear in site.linears.values()], config)
    if reason is not None:
        raise ValueError(reason)
    attached = row.attach(site, own)
    if not attached.trainables:
        raise ValueError(f"{name}: targets {shared.targets!r} and layers {shared.layers!r} leave no trainable parameter")
    return attached


def low_rank_of(linears: Mapping[str, CompressedLinear]) -> frozenset[str]:
    return frozenset(name for name, linear in linears.items() if linear.stored.low_rank is not None)
