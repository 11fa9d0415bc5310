"""Binds a prepared weight to the Triton kernels. Knows prepared weights and launchers; not modules.

Triton is imported when the first weight is bound, so that machines without it can use everything else.
Legend: M tokens, O out, I in, R rank.
"""

import importlib.util

import torch
from torch import Tensor

from ..compress.activation_grid import group_columns
from ..compress.weights import ActivationGrid, DenseWeight
from .checks import RANK_LIMIT
from .layout import TiledWeight, tile
from .operators import Operator, present, rounded
from .prepare import Prepared

NAME = "triton"


class TritonOperator:
    """y = W·Q(x / smooth)[columns] + up·(down·x) + bias by `weight_only_matmul_up`, or by `quantize_down` and `lowbit_matmul_up`
    where the input is rounded and the weight allows integer products."""

    def __init__(self, prepared: Prepared, weight: TiledWeight, integer: bool) -> None:
        self.weight, self.integer = weight, integer
        self.columns, self.smooth, self.activations, self.bias = prepared.columns, prepared.smooth, prepared.activations, prepared.bias
        self.down, self.up, self.segments = factors(prepared)

    def __call__(self, x_MI: Tensor) -> Tensor:
        if self.integer and not (torch.is_grad_enabled() and x_MI.requires_grad):
            return self._integers(x_MI)
        from .weight_only_matmul_up import weight_only_matmul_up

        down = None if self.down is None else self.down.to(x_MI.dtype)
        inner = x_MI if self.smooth is None else x_MI / self.smooth.to(x_MI.dtype)
        inner = rounded(inner, self.activations).to(x_MI.dtype)
        inner = inner if self.columns is None else inner[:, self.columns]
        if inner is x_MI:
            return weight_only_matmul_up(x_MI, self.weight, None, self.up, self.bias, lora_down=down, segments=self.segments)
        h = None if down is None else x_MI @ down.t()
        return weight_only_matmul_up(inner, self.weight, h, self.up, self.bias, segments=self.segments)

    def _integers(self, x_MI: Tensor) -> Tensor:
        from .lowbit_matmul_up import lowbit_matmul_up
        from .quantize_down import quantize_down

        grid = self.activations
        assert isinstance(grid, ActivationGrid)
        codes, scales, h = quantize_down(x_MI, self.smooth, self.down, bits=grid.bits, group_size=grid.group_size)
        return lowbit_matmul_up(
            codes, scales, self.weight, h, self.up, self.bias, group_size=grid.group_size, segments=self.segments, dtype=x_MI.dtype
        )

    def rows(self, ids: Tensor) -> Tensor:
        """float32 [N, I] of rows ids int64 [N] of the weight alone."""
        return self.weight.rows(ids).dense()

    def tensors(self) -> list[Tensor]:
        return present(*self.weight.tensors(), self.columns, self.smooth, self.bias, self.down, self.up)


def factors(prepared: Prepared) -> tuple[Tensor | None, Tensor | None, tuple[tuple[int, int, int, int], ...] | None]:
    """(down [R, I], up [O, widest segment], segments), ranks padded with zeros to a multiple of 8."""
    down, ups = prepared.down, [up for up in prepared.ups if up is not None]
    if down is None or not ups:
        return None, None, None
    padding = -down.shape[0] % 8
    widest = max(up.shape[1] for up in ups)
    up_OR = torch.zeros(prepared.shape[0], widest + -widest % 8, dtype=ups[0].dtype, device=down.device)
    for segment, up in zip(prepared.segments, prepared.ups, strict=True):
        if up is not None:
            up_OR[segment.row : segment.row + segment.rows, : segment.ranks] = up
    segments = tuple((s.row, s.rows, s.rank, s.ranks) for s in prepared.segments)
    return torch.nn.functional.pad(down, (0, 0, 0, padding)).contiguous(), up_OR, segments


def operator_for(prepared: Prepared, place: torch.device, dtype: torch.dtype, wanted: str) -> tuple[Operator, str, str]:
    """(operator, backend, reason). ValueError says why the kernels cannot hold the weight."""
    missing = availability(place)
    if missing != AVAILABLE:
        raise ValueError(f"triton: {missing}")
    if isinstance(prepared.base, DenseWeight):
        raise ValueError("the weight is stored dense, and the kernels read packed codes")
    ranks = 0 if prepared.down is None else prepared.down.shape[0]
    if ranks > RANK_LIMIT:
        raise ValueError(f"rank {ranks} is over the kernels' limit of {RANK_LIMIT}")
    weight = tile(prepared.base)
    if prepared.activations is None:
        return TritonOperator(prepared, weight, False), NAME, "weight-only: the way is chosen by the rows of x, `describe` says which and why"
    why_not = _integer_refusal(prepared, weight)
    levels = "" if why_not or weight.two_levels is None else ", scales of two levels"  # computed now: a graph that is recorded cannot wait for it
    reason = (
        f"W{weight.bits}A{prepared.activations.bits} on the integer unit{levels}, or widened where that is measured faster"
        if not why_not
        else f"input rounded apart, then weight-only: {why_not}"
    )
    return TritonOperator(prepared, weight, not why_not), NAME, reason


def _integer_refusal(prepared: Prepared, weight: TiledWeight) -> str:
    """Why integer products cannot be used, or nothing."""
    from .lowbit_matmul_up import check_weight
    from .quantize_down import CODE_BITS, GROUP_SIZES

    grid = prepared.activations
    assert grid is not None
    if prepared.columns is not None:
        return "the columns are reordered, and the input's groups are not"
    if grid.bits not in CODE_BITS or grid.group_size not in (*GROUP_SIZES, -1):
        return f"the kernel rounds to {CODE_BITS} bits in groups of {GROUP_SIZES} or of a row, not {grid.bits} and {grid.group_size}"
    try:
        check_weight(weight, group_columns(grid.group_size, weight.in_features))
    except ValueError as error:
        return str(error)
    return ""


def defaulted(place: torch.device) -> dict[str, object]:
    """Key → the choice that this process took without a measurement."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from .tuning import defaulted

    return defaulted(place)


AVAILABLE = "fused kernels"


def availability(place: torch.device) -> str:
    """AVAILABLE, or what is missing."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from .launch import runs_triton

    return AVAILABLE if runs_triton(place) else f"does not run on {place.type} (outside the interpreter, TRITON_INTERPRET=1)"
