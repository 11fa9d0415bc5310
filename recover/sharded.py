"""Trained matrices of which every process holds a part: torch's FSDP2 (`torch.distributed.fsdp.fully_shard`) on each decoder block.

Weights, gradients, moments and the values kept of them lie in parts; a block is whole while it runs. What trains outside of the blocks stays whole
everywhere. FSDP adds gradients up in an order of its own, so that the last bits depend on the number of processes. Packed codes do not lie in parts:
where `qat` trains, a code is its float32 latent, which does, and what is packed beneath is a fiftieth of that latent's six copies.
Knows models, parameters and a mesh of processes that is handed in; not files.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .selection import decoder_blocks
from .trainable import Attached


def shard(model: nn.Module, attached: Attached, mesh: Any) -> None:
    """Leave this process its part of every parameter of the blocks; the trainables are those parts (DTensors) from now on. The gradient of a
    parameter is the sum of those of all processes of the one-dimensional `mesh`."""
    from torch.distributed.fsdp import fully_shard

    owners = {id(p): (module, name) for module in model.modules() for name, p in module.named_parameters(recurse=False)}
    places = {key: owners[id(t.parameter)] for key, t in attached.trainables.items()}
    for block in decoder_blocks(model)[1]:
        made: Any = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)
    for key, (module, name) in places.items():
        attached.trainables[key].parameter = module.get_parameter(name)


def is_part(tensor: Tensor) -> bool:
    """Whether other processes hold the rest of it."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is here, in the same memory: all of it, or this process's part."""
    part: Any = tensor
    return part.to_local() if is_part(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it; of a part, every process asks at once."""
    parts: Any = tensor
    return parts.full_tensor() if is_part(tensor) else tensor


def replicated(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that every process holds whole."""
    return {name: tensor for name, tensor in values.items() if not is_part(tensor)}


@torch.no_grad()
def clip_(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Scale the gradients down to a norm of `limit`, if theirs is larger; their norm, over all processes' parts."""
    if not any(map(is_part, parameters)):
        return nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)
    gradients = [p.grad for p in parameters if p.grad is not None]
    groups = [[g for g in gradients if is_part(g)], [g for g in gradients if not is_part(g)]]
    norm = torch.stack([whole(nn.utils.get_total_norm(group)) for group in groups if group]).norm()
    if limit > 0:
        share = (limit / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            local(gradient).mul_(share)
    return norm
