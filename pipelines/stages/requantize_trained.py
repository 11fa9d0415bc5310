"""The last step of dequantize, train, requantize: the trained weights are rounded by GPTQ, block by block, on the inputs that the blocks
below, rounded already, hand in.

Knows the walk over a model that lies in memory whole; the rounding is `compress/requantize`. Legend: N windows, T tokens, D model width.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...compress.requantize import requantize
from ...compress.statistics import InputStatistics, LayerStatistics
from ...compress.weights import DenseWeight, StoredWeight
from ...recover.compressed_linear import CompressedLinear
from ...recover.whole_matrices import MaskedDense
from ..errors import InputError
from ..logs import bar
from ..models.blocks import StreamedModel
from ..models.collecting import gather
from ..models.hidden import Room
from ..store.artifact import Artifact
from .context import Context, check_stop
from .walked import entering, share_of

NEEDS = frozenset({"second_moment"})


@torch.no_grad()
def requantize_trained(
    parent: Artifact, trained: StreamedModel, unrounded: Mapping[str, MaskedDense], address: str, context: Context
) -> None:
    """Round every weight of `unrounded` in place. `trained` has all blocks loaded; `parent` is what it was loaded from, and what its blocks
    are called with is learnt from it. Every rank rounds all of them, on sums that they share. InputError for inputs that are not finite; KeyboardInterrupt on a request to stop."""
    calls = StreamedModel(parent, context.device, context.dtype, virtual=False)
    ids_NT, room = context.inputs.calibration(), Room.measured(context.device, context.scratch, context.ranks.size)
    share = share_of(ids_NT, context.ranks)
    hidden = entering(calls, ids_NT, room, share)
    blocks = trained.structure.blocks
    with bar(f"{address} gptq, blocks", blocks) as shown:
        for index in range(blocks):
            run = partial(_run, trained, calls, index)
            sites = [site for site in trained.structure.of_block(index) if site.name in unrounded]
            statistics = gather(trained, hidden, sites, NEEDS, lambda _, states, run=run: run(states), share)
            for site in sites:
                linear = trained.model.get_submodule(site.name if site.expert is not None else site.module)
                _round(site.name, linear, unrounded[site.name], statistics[site.name])
            if index + 1 < blocks:
                hidden.through(run)
            shown.advance()
            check_stop(context)


def _run(trained: StreamedModel, calls: StreamedModel, index: int, hidden_NTD: Tensor) -> Tensor:
    args, kwargs = calls.call_of(index, hidden_NTD)
    out: Any = trained.layers[index](hidden_NTD, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def _round(name: str, linear: CompressedLinear, weight: MaskedDense, inputs: InputStatistics) -> None:
    bad = inputs.non_finite()
    if bad is not None:
        raise InputError(f"{name}: {bad} of its inputs holds NaN or Inf; train with a smaller learning rate")

    def gptq(base_OI: Tensor, stored: StoredWeight) -> StoredWeight:
        target_OI = StoredWeight(DenseWeight(base_OI), None, stored.low_rank, stored.smooth, stored.delta).dense()
        return requantize(stored, target_OI, LayerStatistics(inputs), "gptq", "hessian")

    linear.reweight = None
    stored, _ = linear.to_stored()
    linear.reweight = weight
    weight.round_by(gptq, stored)
