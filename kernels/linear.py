"""Binds stored weights to the fastest operator their device has, and says which one and why.

`bind` makes one linear, `bind_group` several that read the same input (q/k/v, gate/up): x is rounded and projected down once.
A bound module holds what it multiplies with, packed where a packed operator exists; it is made for one device and cannot be moved.
What an operator cannot express falls back to another one by name (`backend`, `reason`), never silently.
Knows records and operators; not models, stages or files.
Legend: M tokens, O out, I in, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from ..compress.weights import DenseWeight, StoredWeight
from . import cpu_linear, triton_linear
from .checks import RANK_LIMIT
from .choices import cache_file, device_name, entries
from .operators import DenseOperator, Operator, ReferenceOperator, storage_bytes
from .prepare import Prepared, join, prepare

Backend = Literal["auto", "triton", "cpu-int4", "cpu-int8", "dense", "reference"]
BACKENDS = ("auto", "triton", "cpu-int4", "cpu-int8", "dense", "reference")


class FusedLinear(nn.Module):
    """y [..., O] = base·(x / smooth) + up·(down·x) + bias, in x's dtype, by one bound operator.

    backend: the operator's name; reason: why it was taken."""

    def __init__(
        self, operator: Operator, backend: str, reason: str, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.operator, self.backend, self.reason, self.device, self.dtype = operator, backend, reason, device, dtype
        self.out_features, self.in_features = shape

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x has {x.shape[-1]} features in its last dimension; this linear expects {self.in_features}")
        return self.operator(x.reshape(-1, self.in_features).contiguous()).view(*x.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        return stand_in(self, self.dtype)

    def bound_tensors(self) -> list[Tensor]:
        """Everything that the operator keeps: no parameters, so that nothing trains or moves them."""
        return self.operator.tensors()

    def resident_bytes(self) -> int:
        return storage_bytes(self.bound_tensors())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stays(self.device, fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, backend={self.backend}, {self.resident_bytes()} bytes"


class _Pending:
    """What a group has computed for x and not yet returned. No attribute of the module's own, which each cost it a lookup."""

    __slots__ = ("left", "outputs", "version", "x")

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.version: int | None = None
        self.outputs: list[Tensor | None] = []
        self.left = 0


class FusedGroup(nn.Module):
    """Linears that read one x: forward returns a tuple, one [..., O_i] per member, in the order they were given.

    `members` is one FusedLinear for all, or, where they could not be joined (`reason` says why), one for each."""

    def __init__(self, members: Sequence[FusedLinear], sizes: Sequence[int], reason: str) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.sizes, self.reason = list(sizes), reason
        self._pending = _Pending()

    @property
    def backend(self) -> str:
        return "+".join(sorted({str(member.backend) for member in self.members}))

    @property
    def joined(self) -> bool:
        return len(self.members) == 1

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if len(self.members) == 1:
            return self.members[0](x).split(self.sizes, dim=-1)
        return tuple(member(x) for member in self.members)

    def parts(self) -> list["GroupPart"]:
        """One module per member, to stand where the separate linears stood: called with the same x, they compute the group once."""
        return [GroupPart(self, index) for index in range(len(self.sizes))]

    def part(self, index: int, x: Tensor) -> Tensor:
        """Member `index` of the group's output for x; the others are kept until each has been returned or x changes."""
        pending, version = self._pending, None if x.is_inference() else x._version
        if pending.x is not x or pending.version != version or pending.outputs[index] is None:
            pending.x, pending.version, pending.outputs = x, version, list(self.forward(x))
            pending.left = len(pending.outputs)
        out = pending.outputs[index]
        assert out is not None
        pending.outputs[index] = None
        pending.left -= 1
        if pending.left == 0:
            pending.x = None
        return out

    def bound_tensors(self) -> list[Tensor]:
        return [tensor for member in self.linears() for tensor in member.bound_tensors()]

    def resident_bytes(self) -> int:
        return storage_bytes(self.bound_tensors())

    def linears(self) -> list[FusedLinear]:
        return [member for member in self.members if isinstance(member, FusedLinear)]

    def extra_repr(self) -> str:
        return f"sizes={self.sizes}, {self.reason}"


class GroupPart(nn.Module):
    """One member of a FusedGroup in a model that calls its linears one after another."""

    def __init__(self, group: FusedGroup, index: int) -> None:
        super().__init__()
        self.group, self.index = [group], index  # in a list: the group is not this module's child, or it would be counted once a member
        first = group.linears()[0]
        self.device, self.dtype, self.in_features, self.out_features = first.device, first.dtype, first.in_features, group.sizes[index]

    @property
    def backend(self) -> str:
        return self.group[0].backend

    @property
    def reason(self) -> str:
        return self.group[0].reason

    def forward(self, x: Tensor) -> Tensor:
        return self.group[0].part(self.index, x)

    @property
    def weight(self) -> Tensor:
        return stand_in(self, self.dtype)

    def bound_tensors(self) -> list[Tensor]:
        """The group's, shared by all its members."""
        return self.group[0].bound_tensors()

    def resident_bytes(self) -> int:
        """The group's bytes, counted at its first member."""
        return self.group[0].resident_bytes() if self.index == 0 else 0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stays(self.device, fn)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        group = self.group[0]
        place = f"{self.index + 1} of {len(group.sizes)}"
        return f"in_features={self.in_features}, out_features={self.out_features}, backend={self.backend}, {place} that read one input"


def stand_in(linear: Any, dtype: torch.dtype) -> Tensor:
    """[O, I] of the dtype and on the device that code around a linear queries its weight for. It takes no memory, and its numbers are NaN, so
    that multiplying with it does not go unnoticed."""
    return torch.full((), torch.nan, dtype=dtype, device=linear.device).expand(linear.out_features, linear.in_features)


def stays(device: torch.device, fn: Callable[[Tensor], Tensor]) -> None:
    """What `.to` and its kin may do to a bound module: another dtype of the model is no matter; another device, RuntimeError."""
    place = fn(torch.empty(0, device=device)).device
    if place.type != device.type:
        raise RuntimeError(f"bound to the kernels of {device} and cannot move to {place}; load the model again for {place.type!r}")


def resident_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, buffers and bound tensors, memory that several share counted once."""
    bound: list[Any] = [module for module in model.modules() if hasattr(module, "bound_tensors")]
    return storage_bytes([*model.parameters(), *model.buffers(), *(tensor for module in bound for tensor in module.bound_tensors())])


def bind(
    stored: StoredWeight,
    bias: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> FusedLinear:
    """One linear on `device`, for inputs of `dtype` (float32, bfloat16 or float16; others' inputs work too, at some cost).

    backend "auto" takes what the device does fastest; a named one is taken or refused: ValueError says why it cannot hold this weight.
    """
    place = _check(device, dtype, backend, [bias], [stored])
    stored, bias = stored.to(place), None if bias is None else bias.detach().to(place)
    if backend == "reference":
        return FusedLinear(ReferenceOperator(stored, bias), "reference", "requested", stored.shape, place, dtype)
    try:
        prepared = prepare(stored, bias)
    except ValueError as error:
        if backend not in ("auto", "dense"):
            raise ValueError(f"backend {backend!r} cannot hold this weight: {error}; take 'auto', 'dense' or 'reference'") from error
        return _bind_whole(stored, bias, place, dtype, str(error))
    return _bind_prepared(prepared, place, dtype, backend)


def bind_group(
    members: Sequence[tuple[StoredWeight, Tensor | None]],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> FusedGroup:
    """Linears of one input as one product, x rounded and projected down once; each by itself where they cannot be joined."""
    if not members:
        raise ValueError("members is empty; a group needs at least one (weight, bias)")
    place = _check(device, dtype, backend, [bias for _, bias in members], [stored for stored, _ in members])
    widths = {stored.shape[1] for stored, _ in members}
    if len(widths) > 1:
        raise ValueError(f"members read inputs of different widths {sorted(widths)}; a group reads one x")
    sizes = [stored.shape[0] for stored, _ in members]
    try:
        if backend == "reference":
            raise ValueError("the reference computes each member by its definition")
        prepared = [prepare(stored.to(place), None if bias is None else bias.detach().to(place)) for stored, bias in members]
        packed_by_cpu = place.type == "cpu" and backend in ("auto", *cpu_linear.NAMES)
        joined = join(prepared, widen=packed_by_cpu, rank_limit=None if packed_by_cpu or backend == "dense" else RANK_LIMIT)
    except ValueError as error:
        alone = [bind(stored, bias, device=place, dtype=dtype, backend=backend) for stored, bias in members]
        return FusedGroup(alone, sizes, f"bound one by one: {error}")
    return FusedGroup([_bind_prepared(joined, place, dtype, backend)], sizes, f"{len(sizes)} linears as one")


def describe(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a doctor prints: the device, the backends it has with the reason for each one missing, every choice with its reason, measured or
    taken by default in this process, and the file in which the measured ones are kept (without it they are measured again)."""
    place = torch.device(device)
    backends = {"reference": "plain torch", "dense": "a dense matrix and torch's matmul"}
    backends["cpu-int4"] = cpu_linear.availability() if place.type == "cpu" else "only on the CPU"
    backends["cpu-int8"] = "bytes widened to float32 by chunks" if place.type == "cpu" else "only on the CPU"
    backends["triton"] = triton_linear.availability(place)
    return {
        "device": device_name(place),
        "torch": torch.__version__,
        "backends": backends,
        "choices": triton_linear.defaulted(place) | entries(place),
        "cache": str(cache_file(place)),
    }


def _bind_prepared(prepared: Prepared, place: torch.device, dtype: torch.dtype, backend: Backend) -> FusedLinear:
    if backend == "dense" or (backend == "auto" and isinstance(prepared.base, DenseWeight)):
        reason = "requested" if backend == "dense" else "the weight is stored dense"
        return _dense(prepared, place, dtype, reason)
    packed = triton_linear if backend == "triton" or (backend == "auto" and place.type == "cuda") else cpu_linear
    try:
        operator, name, reason = packed.operator_for(prepared, place, dtype, backend)
    except ValueError as error:
        if backend != "auto":
            raise ValueError(f"backend {backend!r} cannot hold this weight: {error}; take 'auto' or 'dense'") from error
        return _dense(prepared, place, dtype, str(error))
    return FusedLinear(operator, name, reason, prepared.shape, place, dtype)


def _dense(prepared: Prepared, place: torch.device, dtype: torch.dtype, reason: str) -> FusedLinear:
    if place.type == "cpu":
        operator, form = cpu_linear.dense_operator(prepared, dtype)
    else:
        operator, form = DenseOperator(prepared, dtype), f"kept in {dtype}"
    return FusedLinear(operator, "dense", f"{reason}; {form}", prepared.shape, place, dtype)


def _bind_whole(stored: StoredWeight, bias: Tensor | None, place: torch.device, dtype: torch.dtype, reason: str) -> FusedLinear:
    """The effective weight as one matrix; where the base's input is rounded no one matrix will do, and the reference serves."""
    if stored.activations is not None:
        why = f"{reason}; its input is rounded, so no single matrix will do"
        return FusedLinear(ReferenceOperator(stored, bias), "reference", why, stored.shape, place, dtype)
    return _dense(prepare(StoredWeight(DenseWeight(stored.dense())), bias), place, dtype, reason)


def _check(
    device: torch.device | str, dtype: torch.dtype, backend: str, biases: Sequence[Tensor | None], weights: Sequence[StoredWeight]
) -> torch.device:
    place = torch.device(device)
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose one of {BACKENDS}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {dtype} is not one the operators compute in; choose float32, bfloat16 or float16")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device {place} has no operators; choose cpu or cuda")
    if backend == "triton" and (missing := triton_linear.availability(place)) != triton_linear.AVAILABLE:
        raise ValueError(f"backend 'triton': {missing}")
    if backend in cpu_linear.NAMES and place.type != "cpu":
        raise ValueError(f"backend {backend!r} does not run on {place}")
    for bias, stored in zip(biases, weights, strict=True):
        if bias is not None and tuple(bias.shape) != (stored.shape[0],):
            raise ValueError(f"bias has shape {tuple(bias.shape)}; expected ({stored.shape[0]},)")
    return place
