"""What one training step holds in addition to the weights: the model is run on the meta device, where tensors have shapes and lives but no bytes.

Exact for whatever the model's own code does, since that code runs; linears are replaced by stand-ins that keep what a `CompressedLinear`
with a trained pair keeps, attention by one that keeps what fused kernels keep. Weights, their gradients and optimizer state are `memory`'s.
Legend: B batch, T tokens, O out, I in, D model, E experts.
"""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from .losses import LossName, Objective, token_loss
from .selection import decoder_blocks
from .student import head_of
from .train import checkpointed

FUSED_ATTENTION = nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Activations:
    """Bytes. `saved`: what waits for backward when the forward pass has ended; `peak`: the most at any moment of forward, loss and
    backward, the loss's chunks of logits included."""

    saved: int
    peak: int


def training_activation_bytes(model: nn.Module, batch: int, seq_len: int, dtype: torch.dtype, checkpointing: bool) -> int:
    """The peak of `training_activations`, for deciding whether a step fits."""
    return training_activations(model, batch, seq_len, dtype, checkpointing).peak


def training_activations(
    model: nn.Module, batch: int, seq_len: int, dtype: torch.dtype, checkpointing: bool, loss: LossName = "both"
) -> Activations:
    """Of a micro-batch [B, T] with forward passes in `dtype`, whole blocks recomputed in backward when `checkpointing`.

    `model` is a causal language model of transformers whose parameters lie on the meta device; it is used up. ValueError where its code
    asks for the value of a number, which a model without bytes cannot answer.
    """
    return step_without_bytes(model, batch, seq_len, dtype, checkpointing, loss, Alive)[0]


def step_without_bytes(
    model: nn.Module, batch: int, seq_len: int, dtype: torch.dtype, checkpointing: bool, loss: LossName, watching: "type[A]"
) -> "tuple[Activations, A]":
    """A training step as `training_activations` runs it, seen by a mode of one's own."""
    full = _on_meta(model, dtype, trained=True)
    logits = head_of(full.get_output_embeddings(), full.config)
    ids_BT = torch.zeros(batch, seq_len, dtype=torch.long, device="meta")
    with watching(full) as alive, checkpointed(full, checkpointing):
        try:
            hidden_ND = full.base_model(input_ids=ids_BT, use_cache=False)[0][:, :-1].flatten(0, 1)
            saved = alive.now
            guide = None if loss == "cross_entropy" else (hidden_ND.detach().clone(), logits)
            mean = token_loss(hidden_ND, logits, ids_BT[:, 1:].flatten(), guide, Objective(loss))
            del hidden_ND, guide
            torch.autograd.backward(mean)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                f"{type(model).__name__}: what training it holds cannot be predicted ({str(error).splitlines()[0]})"
            ) from error
    return Activations(saved, alive.peak), alive


def forward_without_bytes(model: nn.Module, batch: int, seq_len: int, dtype: torch.dtype, watching: "type[A]") -> "A":
    """Tokens [B, T] through the blocks without gradients, seen by a mode. Products of matrices and attention are shapes only."""
    full = _on_meta(model, dtype, trained=False)
    with watching(full) as alive, torch.no_grad():
        full.base_model(input_ids=torch.zeros(batch, seq_len, dtype=torch.long, device="meta"), use_cache=False)
    return alive


def _on_meta(model: nn.Module, dtype: torch.dtype, trained: bool) -> Any:
    full: Any = model.to("meta", dtype).requires_grad_(False).eval()
    _stand_in(full.base_model, dtype, trained)
    return full


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations made within and that are still there (`now`), and the most at once (`peak`); those of the
    model given do not count. A number asked for by value on the meta device is 1: "yes, the mask is plain"."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._bytes: dict[int, int] = {}
        for tensor in () if model is None else (*model.parameters(), *model.buffers()):
            self._bytes[tensor.untyped_storage()._cdata] = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], Tensor) and args[0].is_meta:
            return 1
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._bytes:
            self._bytes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._bytes.pop(key)


A = TypeVar("A", bound=Alive)


class _Fused(TorchFunctionMode):
    """Attention as fused kernels do it: no [T, T] matrix; inputs, output and a number a row are kept."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: tuple[object, ...] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if func is FUSED_ATTENTION:
            return _Attention.apply(*args[:3])
        return func(*args, **(kwargs or {}))


def _fused(forward: Callable[..., object]) -> Callable[..., object]:
    """`forward` under `_Fused`, in backward's recomputation as well, which leaves a mode around the whole step behind."""

    def run(*args: object, **kwargs: object) -> object:
        with _Fused():
            return forward(*args, **kwargs)

    return run


class _Kept(Protocol):
    """What forward leaves for backward."""

    saved_tensors: tuple[Tensor, ...]
    in_features: int

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Kept, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class _Frozen(torch.autograd.Function):
    """x [N, I] → [N, O] by a weight that is rebuilt when it is needed: nothing is kept."""

    @staticmethod
    def forward(ctx: _Kept, x_NI: Tensor, out_features: int) -> Tensor:
        ctx.in_features = x_NI.shape[1]
        return x_NI.new_empty(x_NI.shape[0], out_features)

    @staticmethod
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].new_empty(gradients[0].shape[0], ctx.in_features), None


def _stand_in(body: nn.Module, dtype: torch.dtype, trained: bool) -> None:
    """Every linear and every set of fused experts of the body computes shapes only, and keeps what training it keeps; so does attention."""
    for block in decoder_blocks(body)[1]:
        block.forward = _fused(block.forward)  # type: ignore[method-assign]
    for module in body.modules():
        if isinstance(module, nn.Linear | Conv1D):
            shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            module.forward = _linear(shape[0], shape[1], module.bias, dtype, trained)  # type: ignore[method-assign]
        elif len(fused := [p for p in module.parameters(recurse=False) if p.ndim == 3]) > 1:
            module.forward = _experts(fused[0], fused[-1], dtype, trained)  # type: ignore[method-assign]


def _linear(out_features: int, in_features: int, bias: Tensor | None, dtype: torch.dtype, trained: bool) -> Callable[[Tensor], Tensor]:
    """As `CompressedLinear.forward`, `trained` with a pair of rank 1: its input is kept once, whatever the rank; the pair is `memory`'s."""
    product = _product(out_features, in_features, dtype, trained)

    def forward(x: Tensor) -> Tensor:
        y_NO = product(x.reshape(-1, in_features).to(dtype))
        y_NO = y_NO if bias is None else y_NO + bias
        return y_NO.view(*x.shape[:-1], out_features)

    return forward


def _product(out_features: int, in_features: int, dtype: torch.dtype, trained: bool) -> Callable[[Tensor], Tensor]:
    up_O1, down_1I = (nn.Parameter(torch.empty(shape, device="meta")) for shape in ((out_features, 1), (1, in_features)))

    def product(x_NI: Tensor) -> Tensor:
        y_NO = _Frozen.apply(x_NI, out_features)
        assert isinstance(y_NO, Tensor)
        return y_NO + (x_NI @ down_1I.to(dtype).T) @ up_O1.to(dtype).T if trained else y_NO

    return product


def _experts(first: Tensor, last: Tensor, dtype: torch.dtype, trained: bool) -> Callable[..., Tensor]:
    """The chosen experts of every token: `first` [E, 2·I, D] makes gate and up (or [E, I, D] one of them), `last` [E, D, I]. All as one
    product each, `trained` with a pair."""

    def forward(hidden: Tensor, top_index: Tensor, top_weights: Tensor) -> Tensor:
        rows_ND = hidden.reshape(-1, hidden.shape[-1])
        chosen = rows_ND.repeat_interleave(top_index.shape[-1], 0)
        outer, width = (p.shape[1] * p.shape[2] // rows_ND.shape[1] for p in (first, last))
        made = _product(outer, rows_ND.shape[1], dtype, trained)(chosen)
        inside = nn.functional.silu(made[:, :width]) * made[:, -width:]
        out = _product(rows_ND.shape[1], width, dtype, trained)(inside)
        return (out * top_weights.reshape(-1, 1)).view(*rows_ND.shape[:1], -1, rows_ND.shape[1]).sum(1).view(hidden.shape)

    return forward
