"""A whole artifact in memory as an ordinary transformers model, for training and for generation. Knows no recipe."""

import torch
from transformers import PretrainedConfig

from ..store.artifact import Artifact
from .binding import KernelBinder
from .blocks import Binder, StreamedModel


def whole_model(
    artifact: Artifact, device: torch.device, dtype: torch.dtype, bind: Binder | None = None, config: PretrainedConfig | None = None
) -> StreamedModel:
    """Every block loaded; `.model` is the transformers model, in eval mode, without gradients, virtual tokens in front. `config` stands for
    the artifact's own."""
    streamed = StreamedModel(artifact, device, dtype, bind, config=config)
    for index in range(streamed.structure.blocks):
        streamed.load_block(index)
        streamed.expect(index + 1)
    if streamed.tokens is not None:
        streamed.tokens.stand_before(streamed.model)
    return streamed


def is_fused(artifact: Artifact) -> bool:
    return artifact.manifest["stage"]["name"].startswith("fuse")


def binder_of(artifact: Artifact, device: torch.device) -> Binder | None:
    """The kernels for a fused artifact, dense weights for any other."""
    if not is_fused(artifact):
        return None
    return KernelBinder(artifact.manifest["stage"]["settings"].get("backend", "auto"), device)
