"""Modules that a loading program must not quantize: every linear of the architecture that a checkpoint does not compress.

Programs replace all linears they are not set to skip. Knows the architecture and names, no bytes.
"""

from torch import nn
from transformers.pytorch_utils import Conv1D

from ...compress.weights import DenseWeight
from .checkpoint import Checkpoint
from .naming import Names


def dense_linears(checkpoint: Checkpoint) -> list[str]:
    """Module names (in memory) of linears whose weight is stored as it is: untouched ones, pruned ones, a tied head."""
    model = Names.of(checkpoint.config).model
    kept = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and name not in checkpoint.linears]
    return kept + [name for name, record in checkpoint.linears.items() if isinstance(record.base, DenseWeight)]


def routers(checkpoint: Checkpoint) -> list[str]:
    """Matrices that are no linear in memory but one in other programs' models: the routers of experts."""
    model = Names.of(checkpoint.config).model
    tables = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding | nn.Linear | Conv1D)}
    names = (name.removesuffix(".weight") for name, tensor in model.named_parameters() if tensor.dim() == 2 and name.endswith(".weight"))
    return [name for name in names if name not in tables]
