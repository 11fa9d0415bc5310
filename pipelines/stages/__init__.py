"""The stages by name: each reads a parent artifact and fills a writer. Measuring is the runner's."""

import torch

from ..models.binding import KernelBinder
from ..models.blocks import Binder
from ..recipes.stage_settings import StageSpec
from ..store.artifact import Artifact, ArtifactWriter
from .compress import compress
from .context import Context, Outcome
from .fuse import fuse
from .recover import recover

PERFORM = {"prune": compress, "quantize": compress, "decompose": compress, "recover": recover, "fuse": fuse}


def perform(spec: StageSpec, parent: Artifact, writer: ArtifactWriter, context: Context) -> Outcome:
    return PERFORM[spec.name](parent, writer, spec, context)


def binder(spec: StageSpec | None, device: torch.device, artifact: Artifact) -> Binder | None:
    """How an artifact's records run when it is measured: a fused one through the kernels, all others as dense effective weights."""
    return KernelBinder(spec.config.backend, device) if spec is not None and spec.name == "fuse" else None


__all__ = ["PERFORM", "Context", "Outcome", "binder", "perform"]
