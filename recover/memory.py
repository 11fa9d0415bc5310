"""What training holds in memory, counted from its tensors: packed weights, one dense layer, trainable state, everything else.

Activations follow batch_size and seq_len: `activations` predicts them. Knows a model with a method attached; measures no process.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from ..compress.weights import to_tensors
from .compressed_model import compressed_linears
from .trainable import Attached

COPIES = 6
"""Of a trained value in float32: itself, its gradient, AdamW's two moments, the best and the last evaluated values."""


def training_memory(model: nn.Module, attached: Attached) -> dict[str, int]:
    """Bytes. packed: the records as they lie on disk. dense: the matrices rebuilt from them, all that are kept and the largest of the others.
    trainable: the method's parameters in all their copies. rest: embeddings, norms, biases and whatever a method holds frozen."""
    linears = list(compressed_linears(model).values())
    records = {t.data_ptr(): t for linear in linears for t in to_tensors(linear.stored).values()}
    kept = sum(base * linear.cached + own * linear.holds for linear in linears for base, own in [linear.kept_bytes()])
    passing = [base for linear in linears for base, _ in [linear.kept_bytes()] if not linear.cached]
    trainables = {id(t.parameter) for t in attached.trainables.values()}
    others = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in trainables and t.data_ptr() not in records}
    return {
        "packed_bytes": _bytes(records.values()),
        "dense_bytes": kept + max(passing, default=0),
        "trainable_bytes": attached.count() * 4 * COPIES,
        "rest_bytes": _bytes(others.values()),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
