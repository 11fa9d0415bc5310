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
from .gptq import GptqConfig, GptqNormalFloatConfig, gptq, gptq_nf
from .grids import clip_needs
from .masks import MagnitudeConfig, WandaConfig, magnitude, wanda
from .rounding import Nf4Config, NormalFloatConfig, RtnConfig, nf4, normal_float, rtn
from .smooth import SvdQuantConfig, svdquant
from .smooth import needs as svdquant_needs
from .sparsegpt import SparseGptConfig, sparsegpt


@dataclass(frozen=True)
class Method:
    """`needs` names the statistics (compress/statistics.NEEDS) for a config; `inputs` whose inputs they are taken from:
    the already compressed model below, or the dense one; `version` rises when a fix changes results; `defaults` are the row's
    own values of the config's fields: a row is `config(**(defaults | what the user set))`; `together(weights, targets, statistics,
    config)`, all by name, solves matrices that read one input at once, where the config says `shared`; `departs`: where it is not what
    its paper has; `dense_outputs`: with scope "block", whether it is trained towards what the dense block makes; `by_matrix`: the settings
    that may differ from matrix to matrix, where that is not all of them."""

    config: type
    function: Callable[..., Any]
    needs: Callable[[Any], frozenset[str]] = lambda config: frozenset()
    inputs: Literal["compressed", "dense"] = "compressed"
    scope: Literal["matrix", "block"] = "matrix"
    version: int = 1
    defaults: Mapping[str, Any] = field(default_factory=dict)
    together: Callable[..., Any] | None = None
    departs: str = ""
    dense_outputs: bool = False
    by_matrix: frozenset[str] | None = None


_OF_GRID = frozenset({"bits", "group_size", "symmetric", "clip", "float_zeros", "start", "activations"})
_OF_TERM = frozenset(item.name for item in fields(SvdQuantConfig)) - {"smoothing_steps"}
_REFIT: Mapping[str, Any] = {"requantize": True, "quantizer": "gptq", "clip": "hessian"}
_BEST: Mapping[str, Any] = {"keep_start": True, "first": "kept", "iterations": 5, "follow": True, "overlap": 0.1, "factor_bits": None}


def _low_rank(version: int = 1, **defaults: Any) -> Method:
    return Method(Decomposition, decompose, needs, version=version, defaults=defaults, together=decompose_shared)


DECOMPOSE: Mapping[str, Method] = {
    "loftq": _low_rank(metric="plain", requantize=True, iterations=5),
    "lq_lora": _low_rank(2, metric="fisher", requantize=True, first="l", iterations=100, stop_when_worse=True),
    "zeroquant_v2": _low_rank(metric="plain"),
    "lqer": _low_rank(metric="absmean"),
    "qera_approx": _low_rank(metric="diagonal"),
    "qera_exact": _low_rank(),
    "eora": _low_rank(),
    "cloq": _low_rank(**_REFIT),
    "svdquant": Method(SvdQuantConfig, svdquant, svdquant_needs, scope="block", by_matrix=_OF_TERM),
    "caldera": _low_rank(**_REFIT, iterations=20, factor_bits=4),
    "srr": _low_rank(**_REFIT, kept_rank=None),
    "best": _low_rank(2, **_REFIT, **_BEST),
}


def _magnitude_needs(config: Any) -> frozenset[str]:
    return frozenset({"norms"} if config.allocation == "outliers" else ())


def _feedback_needs(config: Any) -> frozenset[str]:
    """Methods that carry errors on: what leans toward the dense model's inputs needs them beside the compressed ones."""
    leans = getattr(config, "correction", 0.0) or getattr(config, "refit", None)
    return frozenset({"second_moment", "cross_moment"} if leans else {"second_moment"})


PRUNE: Mapping[str, Method] = {
    "magnitude": Method(MagnitudeConfig, magnitude, needs=_magnitude_needs),
    "wanda": Method(WandaConfig, wanda, needs=lambda config: frozenset({"norms"})),
    "sparsegpt": Method(SparseGptConfig, sparsegpt, needs=_feedback_needs),
}

QUANTIZE: Mapping[str, Method] = {
    "rtn": Method(RtnConfig, rtn, needs=lambda config: clip_needs(config.clip)),
    "gptq": Method(GptqConfig, gptq, needs=_feedback_needs),
    "gptq_nf": Method(GptqNormalFloatConfig, gptq_nf, needs=_feedback_needs),
    "nf4": Method(Nf4Config, nf4),
    "normal_float": Method(NormalFloatConfig, normal_float),
    "learned_rounding": Method(
        LearnedRoundingConfig,
        learned_rounding,
        needs=block_needs,
        scope="block",
        version=2,
        dense_outputs=True,
        by_matrix=_OF_GRID,
        departs="AutoRound with one range multiplier a group, where it has one for each end; starts from GPTQ",
    ),
    "block_training": Method(
        BlockTrainingConfig, block_training, needs=block_needs, scope="block", version=2, dense_outputs=True, by_matrix=_OF_GRID
    ),
}

__all__ = ["DECOMPOSE", "PRUNE", "QUANTIZE", "BlockProblem", "Method"]
