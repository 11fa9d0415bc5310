"""Rounds a block of columns on given grids all at once, with the same result as the loop over its columns in `feedback`.

Knows one block and the errors inside it; not how they are carried on behind it.
Legend: O out, S columns of the block.
"""

import torch
from torch import Tensor

_LOOK_EVERY = 3
"""Rounds between two looks at which rows stand."""


def settle_columns_(
    weight_SO: Tensor, levels_SO: Tensor, error_SO: Tensor, unit_SS: Tensor, top: int, scale_SO: Tensor, zero_SO: Tensor, *limits: Tensor
) -> None:
    """Round columns that carry their errors on among themselves, all at once instead of one after the other; the codes lie in 0…`top`, or
    within the `limits` [S, O] where some are given.

    For given values Q the errors solve W − Q = Uᵀ·E, so E = U⁻ᵀ·(W − Q) by one product, and column i holds Q + E when its turn comes. From
    the codes without errors on: round what every column then holds, until no code changes. After r rounds the first r columns stand as a
    loop over columns leaves them, and most rows stand after a few rounds; those that do are taken out of the others' way.
    """
    size, outputs = weight_SO.shape
    one_SS = torch.eye(size, dtype=unit_SS.dtype, device=unit_SS.device)
    carried_SS = torch.linalg.solve_triangular(unit_SS, one_SS, upper=True, unitriangular=True).T
    state = weight_SO.new_empty((5 + len(limits)) * size, outputs)
    from_0, scale, *ends, codes, other, error = state.split(size)
    torch.addcmul(weight_SO, zero_SO, scale_SO, out=from_0)
    torch.cat((scale_SO, *limits), out=state[size : (2 + len(limits)) * size])
    _round_to_codes_(torch.div(from_0, scale, out=codes), top, *ends)
    rows_N, moving = None, outputs
    for step in range(1, size + 1):
        torch.mm(carried_SS, torch.addcmul(from_0, codes, scale, value=-1, out=other), out=error)
        _round_to_codes_(torch.addcdiv(codes, error, scale, out=other), top, *ends)
        codes, other = other, codes
        if step % _LOOK_EVERY:
            continue
        moved_M = other.ne_(codes).amax(0).nonzero().view(-1)
        if not len(moved_M):
            break
        if 2 * len(moved_M) < moving:
            _write_rows_(levels_SO, rows_N, codes)
            rows_N, moving = moved_M if rows_N is None else rows_N[moved_M], len(moved_M)
            state = state.index_select(1, moved_M)
            from_0, scale, *ends, codes, other, error = state.split(size)
            codes, other = (other, codes) if step % 2 else (codes, other)
    _write_rows_(levels_SO, rows_N, codes)
    levels_SO.sub_(zero_SO)
    torch.mm(carried_SS, torch.addcmul(weight_SO, levels_SO, scale_SO, value=-1), out=error_SO)
    torch.addcmul(error_SO, levels_SO, scale_SO, out=weight_SO)


def _round_to_codes_(value: Tensor, top: int, *limits: Tensor) -> None:
    if limits:
        torch.clamp(value.round_(), *limits, out=value)
    else:
        value.round_().clamp_(0, top)


def _write_rows_(out_SO: Tensor, rows_N: Tensor | None, values_SN: Tensor) -> None:
    if rows_N is None:
        out_SO.copy_(values_SN)
    else:
        out_SO.index_copy_(1, rows_N, values_SN)
