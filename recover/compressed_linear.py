"""A compressed linear that can train: packed base, rebuilt on the fly, plus whatever a method puts around it.

y = W(x / smooth, rounded when activations are) + up·down·x + delta·x + bias, W = reweight(base ⊙ mask).
Memory is the packed record plus one dense matrix while it is used; `cached` keeps the base's matrix, `holds` the one that multiplies while no
trained value moves (bit-identical).
Knows records and tensors; not how a weight was compressed, nor files.
Legend: O out, I in, R rank, T tokens (all leading dimensions), N sparse values.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..compress.activation_grid import fake_quantize
from ..compress.precision import summed
from ..compress.weights import ActivationGrid, DenseWeight, Factor, LowRank, SparseDelta, StoredWeight, UniformWeight
from .scales import RelativeScales
from .trainable import Trainable, through


class _Kept(Protocol):
    """What forward leaves for backward."""

    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]
    linear: "CompressedLinear"

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class RebuiltLinear(torch.autograd.Function):
    """x Wᵀ where W = linear.matrix(parameters) is built in forward, dropped, and built again in backward, unless it is held."""

    @staticmethod
    def forward(ctx: _Kept, x_TI: Tensor, linear: "CompressedLinear", *parameters: Tensor) -> Tensor:
        ctx.linear = linear
        needs_x = any(p.requires_grad for p in parameters)
        ctx.save_for_backward(x_TI if needs_x else None, *parameters)
        return x_TI @ linear.matrix(parameters).T

    @staticmethod
    def backward(ctx: _Kept, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, *parameters = ctx.saved_tensors
        linear, wanted = ctx.linear, ctx.needs_input_grad
        gradient_TO = gradients[0].to(linear.dtype)
        if not any(wanted[2:]):
            x_gradient = gradient_TO @ linear.matrix(parameters) if wanted[0] else None
            return (x_gradient, None, *(None for _ in parameters))
        product = summed if getattr(linear.reweight, "sums_gradient", False) else torch.matmul
        weight_gradient = product(gradient_TO.T, x_TI)
        x_gradient, result = linear.pull_back(gradient_TO if wanted[0] else None, weight_gradient, parameters, wanted[2:])
        return (x_gradient, None, *result)


class RoundedInput(torch.autograd.Function):
    """x [T, I] rounded as every operator of `kernels` rounds it, bit for bit; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: object, x_TI: Tensor, grid: ActivationGrid) -> Tensor:
        return fake_quantize(x_TI, grid.bits, grid.group_size)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class SparseValues(nn.Module):
    """Values float32 [N] at flat positions int64 [N] of the [O, I] matrix; `merges` when `to_stored` adds them to a dense base."""

    index: Tensor

    def __init__(self, index_N: Tensor, values_N: Tensor, storage: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("index", index_N.long())
        self.values = nn.Parameter(values_N.float(), requires_grad=False)
        self.storage, self.merges = storage, False

    def record(self) -> SparseDelta:
        values = self.values.detach().to(self.storage)
        return SparseDelta(self.index.to(torch.int32), values)


class CompressedLinear(nn.Module):
    """Takes the place of nn.Linear (and of GPT-2's Conv1D: records are always [O, I]). Everything starts frozen.

    `reweight`, set by a method, maps the dense base to the weight that is used: `weights(base_OI | None, *parameters)`,
    `fold(stored) -> StoredWeight`, attribute `needs_base`; optional `pull_back(weight_OI, gradient_OI)` → gradients of its parameters, where
    `weight_OI` is what `weights` gave (None where it needs no base), and `sums_gradient`: all of them are sums over the groups of a row.
    `branches` add to the output from (raw x, x of the base); `after` changes the output before the bias.
    """

    def __init__(self, stored: StoredWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.stored, self.dtype = stored, dtype
        self.out_features, self.in_features = stored.shape
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.bias_storage: torch.dtype | None = None if bias is None else bias.dtype
        self.up: nn.Parameter | None = None
        self.down: nn.Parameter | None = None
        self.up_scales: RelativeScales | None = None
        self.down_scales: RelativeScales | None = None
        if stored.low_rank is not None:
            self.set_low_rank(*stored.low_rank.factors())
        self.sparse: SparseValues | None = None
        if stored.delta is not None:
            self.sparse = SparseValues(stored.delta.index, stored.delta.values, stored.delta.values.dtype)
        self.reweight: Any = None
        self.branches = nn.ModuleList()
        self.after: nn.Module | None = None
        self.cached = self.holds = self._steady = False
        self._cache: Tensor | None = None
        self._held: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return next(_tensors(self.stored)).device

    # The matrix ------------------------------------------------------------------------------------------------------

    def base(self) -> Tensor:
        """base ⊙ mask, [O, I] in `base_dtype`; never to be written into."""
        if self._cache is not None and self._cache.dtype == self.base_dtype:
            return self._cache
        with torch.no_grad():
            weight = self.stored.base_dense(self.base_dtype)
        if self.cached:
            self._cache = weight
        return weight

    def cache(self, keep: bool) -> None:
        self.cached, self._cache = keep, None

    def kept_bytes(self) -> tuple[int, int]:
        """What the base takes where it is `cached`, and the matrix that multiplies where it `holds` one of its own."""
        size = self.out_features * self.in_features
        rebuilt = not (isinstance(self.stored.base, DenseWeight) and self.stored.mask is None)
        base = size * self.base_dtype.itemsize if rebuilt and (self.reweight is None or self.reweight.needs_base) else 0
        return base, size * self.dtype.itemsize if self.weight_parameters() else 0

    def steady(self, on: bool) -> None:
        """Promise that no trained value moves until it is taken back."""
        self._steady, self._held = on, None

    def matrix(self, parameters: Sequence[Tensor]) -> Tensor:
        """`effective` outside of autograd."""
        if self._held is not None:
            return self._held
        weight = self.effective(*parameters)
        if self.holds and self._steady:
            self._held = weight
        return weight

    @property
    def base_dtype(self) -> torch.dtype:
        """The compute dtype; float32 where something trained changes the matrix, which is rounded once, behind the change, as the stored
        matrix will be: a scale moved by 1/300 does not move a bfloat16 factor."""
        changes = self.inline_sparse or (self.reweight is not None and self.reweight.needs_base)
        return torch.float32 if changes else self.dtype

    @property
    def inline_sparse(self) -> bool:
        """Whether the sparse delta may share the base's product: it must see the raw input."""
        return self.sparse is not None and self.stored.smooth is None and self.stored.activations is None

    def weight_parameters(self) -> list[Tensor]:
        result: list[Tensor] = [] if self.reweight is None else list(self.reweight.parameters())
        return [*result, self.sparse.values] if self.sparse is not None and self.inline_sparse else result

    def effective(self, *parameters: Tensor) -> Tensor:
        """The matrix that multiplies the base's input, differentiable in `parameters` (the order of `weight_parameters`)."""
        own = parameters[:-1] if self.inline_sparse else parameters
        weight = self.base() if self.reweight is None or self.reweight.needs_base else None
        if self.reweight is not None:
            weight = self.reweight.weights(weight, *own)
        assert weight is not None
        if self.sparse is not None and self.inline_sparse:
            weight = weight.reshape(-1).index_add(0, self.sparse.index, parameters[-1].to(weight.dtype)).view(self.stored.shape)
        return weight.to(self.dtype)

    def pull_back(
        self, gradient_TO: Tensor | None, gradient_OI: Tensor, parameters: list[Tensor], wanted: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """(gradient of x, gradients of `parameters`) from the gradients of the output and of the matrix; `gradient_OI` is used up."""
        own = parameters[:-1] if self.inline_sparse else parameters
        sparse: list[Tensor | None] = []
        if self.sparse is not None and self.inline_sparse:
            sparse.append(gradient_OI.reshape(-1)[self.sparse.index].float() if wanted[-1] else None)
        if self.reweight is not None and any(wanted[: len(own)]) and not hasattr(self.reweight, "pull_back"):
            return self._pull_back_by_autograd(gradient_TO, gradient_OI, parameters, sparse)
        reweight = self.reweight if any(wanted[: len(own)]) else None
        weight = None if gradient_TO is None and (reweight is None or not reweight.needs_base) else self.matrix(parameters)
        x_gradient = None if gradient_TO is None or weight is None else gradient_TO @ weight
        if reweight is None:
            return x_gradient, [*(None for _ in own), *sparse]
        if reweight.needs_base and self.inline_sparse:  # `weight` has the sparse values, too
            weight = reweight.weights(self.base(), *own)
        return x_gradient, [*reweight.pull_back(weight if reweight.needs_base else None, gradient_OI), *sparse]

    def _pull_back_by_autograd(
        self, gradient_TO: Tensor | None, gradient_OI: Tensor, parameters: list[Tensor], sparse: list[Tensor | None]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        count = len(parameters) - len(sparse)
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_(True) for p in parameters[:count]]
            weight = self.effective(*leaves, *parameters[count:])
        x_gradient = None if gradient_TO is None else gradient_TO @ weight.detach()
        return x_gradient, [*torch.autograd.grad(weight, leaves, gradient_OI, allow_unused=True), *sparse]

    # Running ---------------------------------------------------------------------------------------------------------

    def base_input(self, x: Tensor) -> Tensor:
        """What the base multiplies: smoothed, and rounded with a straight-through gradient when activations are quantized."""
        if self.stored.smooth is not None:
            x = x / self.stored.smooth.to(x.dtype)
        if self.stored.activations is None:
            return x
        rounded = RoundedInput.apply(x, self.stored.activations)
        assert isinstance(rounded, Tensor)
        return rounded

    def forward(self, x: Tensor) -> Tensor:
        raw_TI = x.reshape(-1, self.in_features).to(self.dtype)
        x_TI = self.base_input(raw_TI)
        y = RebuiltLinear.apply(x_TI, self, *self.weight_parameters())
        assert isinstance(y, Tensor)
        if (pair := self.pair()) is not None:
            y = y + (raw_TI @ pair[1].to(self.dtype).T) @ pair[0].to(self.dtype).T
        if self.sparse is not None and not self.inline_sparse:
            y = y + raw_TI @ self._sparse_matrix().T
        for branch in self.branches:
            y = y + branch(raw_TI, x_TI)
        if self.after is not None:
            y = self.after(y)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _sparse_matrix(self) -> Tensor:
        assert self.sparse is not None
        empty = torch.zeros(self.out_features * self.in_features, dtype=self.dtype, device=self.sparse.values.device)
        return empty.index_add(0, self.sparse.index, self.sparse.values.to(self.dtype)).view(self.stored.shape)

    @property
    def weight(self) -> Tensor:
        """The effective weight [O, I] of the record as stored, for code that asks a linear for its `weight`."""
        return self.stored.dense(self.dtype)

    # What can train --------------------------------------------------------------------------------------------------

    def set_low_rank(self, up_OR: Tensor, down_RI: Tensor) -> None:
        self.up = nn.Parameter(up_OR.detach().float().clone(), requires_grad=False)
        self.down = nn.Parameter(down_RI.detach().float().clone(), requires_grad=False)
        self.up_scales = self.down_scales = None

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """(up [O, R], down [R, I]) float32 as they are now, differentiable in what trains of them; None without a low-rank term."""
        if self.up is None or self.down is None:
            return None
        return _moved(self.up, self.up_scales), _moved(self.down, self.down_scales)

    def train_low_rank(self, storage: torch.dtype = torch.float16) -> dict[str, Trainable]:
        """The low-rank pair, created by `set_low_rank` or found in the record, as trainables. Of a factor on a grid the scales train and the
        codes stay: what one training moves is less than half a step of 4 bits, which rounding would undo."""
        assert self.up is not None and self.down is not None
        low_rank, out = self.stored.low_rank, {}
        for name, parameter in (("up", self.up), ("down", self.down)):
            factor = None if low_rank is None else getattr(low_rank, name)
            if isinstance(factor, UniformWeight):
                scales = RelativeScales(StoredWeight(factor))
                setattr(self, f"{name}_scales", scales)
                out[f"{name}_scales"] = scales.trainables()["scales"]
            else:
                parameter.requires_grad_(True)
                out[name] = Trainable(parameter, "factors", through(storage if factor is None else factor.dtype))
        return out

    def train_bias(self, storage: torch.dtype | None = None) -> Trainable:
        """The bias, created as zeros where the linear has none."""
        if self.bias is None:
            self.bias = nn.Parameter(torch.zeros(self.out_features, device=self.device))
            self.bias_storage = storage or torch.float32
        self.bias.data = self.bias.data.float()
        self.bias.requires_grad_(True)
        return Trainable(self.bias, "biases", through(self.bias_storage or torch.float32))

    def to_stored(self, factor_storage: torch.dtype = torch.float16) -> tuple[StoredWeight, Tensor | None]:
        """The record after training, in storage dtypes, and the bias. ValueError when something around the linear has no place in a record."""
        stored = self.stored
        if self.up is not None and self.down is not None:
            old = stored.low_rank
            up = _stored_factor(self.up, self.up_scales, None if old is None else old.up, factor_storage)
            down = _stored_factor(self.down, self.down_scales, None if old is None else old.down, factor_storage)
            stored = replace(stored, low_rank=LowRank(up, down, None if old is None else old.shared))
        if self.sparse is not None:
            stored = _with_sparse(stored, self.sparse)
        parts: list[Any] = [self.reweight, *self.branches, self.after]
        for part in parts:
            if part is not None:
                if not hasattr(part, "fold"):
                    raise ValueError(f"{type(part).__name__} has no place in a stored weight; store it as an adapter of the model")
                stored = part.fold(stored)
        bias = None if self.bias is None else self.bias.detach().to(self.bias_storage or self.bias.dtype)
        return stored, bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CompressedLinear":
        """Follow the model to another device; the record's dtypes are what is stored and stay."""
        device = fn(torch.empty(0, device=self.device)).device
        if device != self.device:
            self.stored, self._cache = self.stored.to(device), None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {type(self.stored.base).__name__}, {self.stored.bits_per_weight():.2f} bits"


def _moved(factor: Tensor, scales: RelativeScales | None) -> Tensor:
    return factor if scales is None else scales.weights(factor, scales.delta)


def _stored_factor(value: Tensor, scales: RelativeScales | None, old: Factor | None, storage: torch.dtype) -> Factor:
    """A factor in its storage form: that of the one before it, or 16 bits."""
    if scales is not None:
        folded = scales.fold(scales.stored).base
        assert isinstance(folded, UniformWeight)
        return folded
    if isinstance(old, UniformWeight):
        return old
    return value.detach().to(storage if old is None else old.dtype)


def _with_sparse(stored: StoredWeight, sparse: SparseValues) -> StoredWeight:
    """The trained delta in the record: added to a dense base where it merges, else stored next to the base."""
    if not bool(sparse.values.detach().any()):
        return stored
    return merge_delta(stored, sparse.record()) if sparse.merges else replace(stored, delta=sparse.record())


def merge_delta(stored: StoredWeight, delta: SparseDelta) -> StoredWeight:
    """A sparse delta on kept weights added to a dense base."""
    assert isinstance(stored.base, DenseWeight)
    weight = delta.add_to_(stored.base_dense().clone())
    return replace(stored, base=DenseWeight(weight.to(stored.base.weight.dtype)))


def _tensors(stored: StoredWeight) -> Iterator[Tensor]:
    base = stored.base
    yield base.weight if isinstance(base, DenseWeight) else base.codes
