"""The compression methods by name: literal dicts, one row a method.

A row's `function(weight, target_OI, statistics, config)` takes a StoredWeight, the float32 [O, I] matrix it should imitate,
LayerStatistics and its config, and returns (StoredWeight, {metric: number}). It knows no files and no models.
A row with scope "block" is given one decoder block as a whole; see `BlockProblem`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .block import BlockProblem
from .block_training import BlockTrainingConfig, LearnedRoundingConfig, block_needs, block_training, learned_rounding
from .decompose import Decomposition, decompose, decompose_shared, needs
from .gptq import GptqConfig, GptqNormalFloatConfig, by_rows, gptq, gptq_group, gptq_nf
from .grids import clip_needs
from .masks import MagnitudeConfig, WandaConfig, magnitude, wanda
from .rounding import Nf4Config, NormalFloatConfig, RtnConfig, nf4, normal_float, rtn
from .smooth import SvdQuantConfig, svdquant
from .smooth import needs as svdquant_needs
from .sparsegpt import SparseGptConfig, sparsegpt


@dataclass(frozen=True)
class Method:
    """`does` in one line and `paper` (its name and arXiv id, empty where there is none) are for a reader. `needs` names the statistics
    (compress/statistics.NEEDS) for a config; `inputs` whose inputs they are taken from:
    the already compressed model below, or the dense one; `version` rises when a fix changes results; `defaults` are the row's
    own values of the config's fields: a row is `config(**(defaults | what the user set))`; `solve_group(weights, targets, statistics,
    config)`, all by name, solves matrices that read one input and have one config at once, unless that says `shared: false`; `departs`: where it is not what
    its paper has; `dense_outputs`: with scope "block", whether it is trained towards what the dense block makes; `by_matrix`: the settings
    that may differ from matrix to matrix, where that is not all of them; `by_rows`: whether `solve_group` takes a `share`, with which several
    processes solve rows of one large matrix."""

    config: type
    function: Callable[..., Any]
    needs: Callable[[Any], frozenset[str]] = lambda config: frozenset()
    inputs: Literal["compressed", "dense"] = "compressed"
    scope: Literal["matrix", "block"] = "matrix"
    version: int = 1
    defaults: Mapping[str, Any] = field(default_factory=dict)
    solve_group: Callable[..., Any] | None = None
    departs: str = ""
    dense_outputs: bool = False
    does: str = ""
    paper: str = ""
    by_matrix: frozenset[str] | None = None
    by_rows: Callable[[Any], bool] = lambda config: False


_OF_GRID = frozenset({"bits", "group_size", "symmetric", "clip", "float_zeros", "start", "activations", "grid"})
_OF_TERM = frozenset(item.name for item in fields(SvdQuantConfig)) - {"smoothing_steps"}
_REFIT: Mapping[str, Any] = {"requantize": True, "quantizer": "gptq", "clip": "hessian"}
_BEST: Mapping[str, object] = {"keep_start": True, "first": "kept", "iterations": 5, "follow": True, "overlap": 0.1, "factor_bits": None}


def _low_rank(does: str, paper: str, version: int = 1, **defaults: object) -> Method:
    return Method(Decomposition, decompose, needs, version=version, defaults=defaults, solve_group=decompose_shared, does=does, paper=paper)


DECOMPOSE: Mapping[str, Method] = {
    "loftq": _low_rank(
        "rounding and L in turn, on the plain error", "LoftQ, arXiv:2310.08659", metric="plain", requantize=True, iterations=5
    ),
    "lq_lora": _low_rank(
        "L and rounding in turn under the Fisher information",
        "LQ-LoRA, arXiv:2311.12023",
        2,
        metric="fisher",
        requantize=True,
        first="l",
        iterations=100,
        stop_when_worse=True,
    ),
    "zeroquant_v2": _low_rank("L of the plain error", "ZeroQuant-V2, arXiv:2303.08302", metric="plain"),
    "lqer": _low_rank("L of the error scaled by the mean |x|", "LQER, arXiv:2402.02446", metric="absmean"),
    "qera_approx": _low_rank("L of the error scaled by the root mean square of x", "QERA, arXiv:2410.06040", metric="diagonal"),
    "qera_exact": _low_rank("the best L under the second moment of x", "QERA, arXiv:2410.06040"),
    "eora": _low_rank("the best L under the second moment of x", "EoRA, arXiv:2410.21271"),
    "cloq": _low_rank("GPTQ of W − L, then the best L", "CLoQ, arXiv:2501.18475", **_REFIT),
    "svdquant": Method(
        SvdQuantConfig,
        svdquant,
        svdquant_needs,
        scope="block",
        by_matrix=_OF_TERM,
        does="smoothed inputs, L of the weight, the residual on a grid",
        paper="SVDQuant, arXiv:2411.05007",
    ),
    "caldera": _low_rank("GPTQ and L in turn, the factors in 4 bits", "CALDERA, arXiv:2405.18886", **_REFIT, iterations=20, factor_bits=4),
    "srr": _low_rank("some ranks of W before GPTQ, the others after it", "SRR, arXiv:2602.02001", **_REFIT, kept_rank=None),
    "best": _low_rank("from the stored codes, GPTQ errs where L compensates", "", 2, **_REFIT, **_BEST),
}


def _magnitude_needs(config: Any) -> frozenset[str]:
    return frozenset({"norms"} if config.allocation == "outliers" else ())


def _feedback_needs(config: object) -> frozenset[str]:
    """Methods with error compensation: a correction or refit towards the dense model's inputs needs those as well as the compressed model's."""
    leans = getattr(config, "correction", 0.0) or getattr(config, "refit", None)
    guided = frozenset({"guidance"} if getattr(config, "guided", 0) else ())
    return guided | frozenset({"second_moment", "cross_moment"} if leans else {"second_moment"})


PRUNE: Mapping[str, Method] = {
    "magnitude": Method(MagnitudeConfig, magnitude, needs=_magnitude_needs, does="drops the smallest |w|", paper="arXiv:1506.02626"),
    "wanda": Method(
        WandaConfig,
        wanda,
        needs=lambda config: frozenset({"norms"}),
        does="drops the smallest |w|·‖x‖ of each output row",
        paper="Wanda, arXiv:2306.11695",
    ),
    "sparsegpt": Method(
        SparseGptConfig,
        sparsegpt,
        needs=_feedback_needs,
        does="drops block by block, later columns compensate",
        paper="SparseGPT, arXiv:2301.00774",
    ),
}

QUANTIZE: Mapping[str, Method] = {
    "rtn": Method(RtnConfig, rtn, needs=lambda config: clip_needs(config.clip), does="the nearest code of a uniform grid"),
    "gptq": Method(
        GptqConfig,
        gptq,
        needs=_feedback_needs,
        version=2,
        solve_group=gptq_group,
        by_rows=by_rows,
        does="column by column, later ones compensate the error",
        paper="GPTQ, arXiv:2210.17323",
    ),
    "gptq_nf": Method(
        GptqNormalFloatConfig, gptq_nf, needs=_feedback_needs, does="GPTQ on a NormalFloat book", paper="GPTQ, arXiv:2210.17323"
    ),
    "nf4": Method(Nf4Config, nf4, does="NF4, bit for bit bitsandbytes'", paper="QLoRA, arXiv:2305.14314"),
    "normal_float": Method(
        NormalFloatConfig, normal_float, does="the nearest code of a NormalFloat book of 2 to 8 bits", paper="LQ-LoRA, arXiv:2311.12023"
    ),
    "learned_rounding": Method(
        LearnedRoundingConfig,
        learned_rounding,
        needs=block_needs,
        scope="block",
        version=3,
        dense_outputs=True,
        by_matrix=_OF_GRID,
        departs="AutoRound with one range multiplier a group, where it has one for each end; starts from GPTQ",
        does="rounding offsets and ranges trained block by block",
        paper="AutoRound, arXiv:2309.05516",
    ),
    "block_training": Method(
        BlockTrainingConfig,
        block_training,
        needs=block_needs,
        scope="block",
        version=3,
        dense_outputs=True,
        by_matrix=_OF_GRID,
        does="weights, scales and zeros trained block by block",
        paper="EfficientQAT, arXiv:2407.11062",
    ),
}

__all__ = ["DECOMPOSE", "PRUNE", "QUANTIZE", "BlockProblem", "Method"]
