"""Biases that recovery added to linears whose architecture has none: enabled in the config where it has a field for them, else the export is refused.

Programs drop tensors they have no place for in silence, and then compute something else. Knows configs and names, no format.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from ..errors import UsageError
from .checkpoint import Checkpoint, Lazy, config_dtype
from .naming import Names

SWITCHES = ("attention_bias", "mlp_bias", "qkv_bias", "use_bias", "bias")


def with_room_for_biases(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its config's bias switches on where it has such biases, missing ones filled with zeros.

    Biases that are zero everywhere and have no place are left out. UsageError when no switch makes room.
    """
    names = Names.of(checkpoint.config)
    homeless = [name for name in checkpoint.tensors if name.endswith(".bias") and name not in names.shapes]
    needed = [name for name in homeless if checkpoint.tensors[name].count_nonzero()]
    tensors = {name: partial(checkpoint.tensors.__getitem__, name) for name in checkpoint.tensors if name not in homeless}
    if not needed:
        return replace(checkpoint, tensors=Lazy(tensors)) if homeless else checkpoint
    config, shapes = _switched_on(checkpoint, set(needed))
    for name in needed:
        tensors[name] = partial(checkpoint.tensors.__getitem__, name)
    for name, shape in shapes.items():
        if name not in tensors and name not in names.shapes:
            tensors[name] = partial(_zeros, shape, config_dtype(checkpoint))
    return replace(checkpoint, config=config, tensors=Lazy(tensors))


def _switched_on(checkpoint: Checkpoint, needed: set[str]) -> tuple[dict, Mapping[str, torch.Size]]:
    switches = [name for name in SWITCHES if name in checkpoint.config]
    for count in range(1, len(switches) + 1):
        for chosen in combinations(switches, count):
            config = {**checkpoint.config, **dict.fromkeys(chosen, True)}
            shapes = Names.of(config).shapes
            if needed <= set(shapes):
                return config, shapes
    name = min(needed)
    raise UsageError(
        f"{name} was added by the recovery, and {checkpoint.config.get('model_type')} models have no place for it in any format here; "
        "recover without biases (layer norms and factors can be exported)"
    )


def _zeros(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype)
