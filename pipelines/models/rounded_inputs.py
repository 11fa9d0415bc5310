"""Activation quantization simulated (W4A8, W4A4): a module's base sees its inputs rounded per token and group, a low-rank term the raw ones.

Works on plain modules by hooks, on the experts of a fused parameter by watching their products; a gradient passes straight through.
Knows records and modules; the rounding is `kernels/reference`'s.
Legend: O out, I in.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ...compress.activation_grid import fake_quantize
from ...compress.weights import StoredWeight


def round_inputs(module: Any, record: StoredWeight) -> None:
    """Make a linear (or Conv1D) that holds the record's effective weight round its inputs as the record says, in place of what it did."""
    raw_inputs(module)
    if record.activations is not None:
        change = _Change(record)
        module.rounded = module.register_forward_hook(lambda _, args, out: out + change(args[0]))


def round_expert_inputs(module: Any, matrix: Tensor, record: StoredWeight) -> None:
    """The same for one expert: `matrix` is the slice of the module's fused parameter, as the module hands it to `linear`."""
    if not hasattr(module, "rounded"):
        if record.activations is None:
            return
        module.rounded = _Experts(module)
    module.rounded.set(matrix.data_ptr(), None if record.activations is None else _Change(record))


def raw_inputs(module: Any) -> None:
    """Undo either."""
    if hasattr(module, "rounded"):
        module.rounded.remove()
        del module.rounded


class _Change:
    """x → what rounding changes in the output: base · (rounded − unrounded)."""

    def __init__(self, record: StoredWeight) -> None:
        self.grid, self.smooth, self.base_OI = record.activations, record.smooth, record.base_dense()

    def __call__(self, x: Tensor) -> Tensor:
        assert self.grid is not None
        smoothed = x if self.smooth is None else x / self.smooth.to(x)
        moved = (fake_quantize(smoothed, self.grid.bits, self.grid.group_size) - smoothed).detach()
        return nn.functional.linear(moved, self.base_OI.to(x))


class _Experts(torch.overrides.TorchFunctionMode):
    """While the module runs, adds the change to every `linear` whose weight is one of its slices."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.changes: dict[int, _Change] = {}
        enter = module.register_forward_pre_hook(lambda *_: self.__enter__() and None)
        leave = module.register_forward_hook(lambda *_: self.__exit__(None, None, None), always_call=True)
        self.handles = (enter, leave)

    def set(self, slice_pointer: int, change: _Change | None) -> None:
        if change is None:
            self.changes.pop(slice_pointer, None)
        else:
            self.changes[slice_pointer] = change

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        change = self.changes.get(args[1].data_ptr()) if func is nn.functional.linear and isinstance(args[1], Tensor) else None
        return out if change is None else out + change(args[0])
