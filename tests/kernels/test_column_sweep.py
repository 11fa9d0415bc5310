"""The kernel of GPTQ's columns against the loop: codes, errors, what is left of the weights, and the loss."""

import pytest
import torch
from bitmend.compress import feedback
from bitmend.compress.feedback import BLOCK, GivenGrids, feed_back_uniform_, inverse_factor
from bitmend.compress.grids import UniformGrid, fit
from bitmend.kernels import column_sweep

KINDS = ({"rows": 33, "symmetric": True}, {"block": 40}, {"float_zeros": True, "pull": 0.2}, {"masked": True, "bits": 2, "pull": 0.7})


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_kernel_is_the_loop(kind: dict[str, float], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, group, bits = int(kind.get("rows", 20)), 64, 32, int(kind.get("bits", 4))
    x = torch.randn(4 * columns, columns) @ (torch.eye(columns) + 0.1 * torch.randn(columns, columns))
    weight, pull, block = torch.randn(rows, columns) / columns**0.5, kind.get("pull", 0.0), int(kind.get("block", BLOCK))
    factor = inverse_factor((x.T @ x / len(x)).to(device), 0.01, True)
    grid = UniformGrid(bits, group, bool(kind.get("symmetric")), bool(kind.get("float_zeros")))
    scale, zero = (actual.squeeze(-1).T.contiguous().to(device) for actual in fit(weight.view(rows, -1, group), grid, "power"))
    keep = (torch.rand(columns, rows) < 0.6).to(device) if kind.get("masked") else None
    grids = GivenGrids(scale, zero, factor.order_I // group, keep, grid.top, grid.float_zeros)
    work = weight.to(device).T[factor.order_I].contiguous()
    swept, actual = work.clone(), work.clone()
    monkeypatch.setattr(torch.ops.bitmend, "feed_back_block_", feedback.feed_back_block_)
    levels, loss = feed_back_uniform_(swept, factor, grids, block, pull)
    for module, name in ((feedback, "feed_back_block_"), (torch.ops.bitmend, "feed_back_block_")):  # by name on the CPU, by operator on a card
        monkeypatch.setattr(module, name, column_sweep.feed_back_block_)
    again, lost = feed_back_uniform_(actual, factor, grids, block, pull)
    same = again == levels
    assert same.float().mean() >= 0.9999 and len(levels.unique()) > 3
    assert keep is None or not again[~keep].any()
    target = work + 0.0
    seen = ((again - levels) * scale[grids.group_I]).norm() / ((levels * scale[grids.group_I]) - target).norm()
    assert seen <= 1e-4, "output"
    torch.testing.assert_close(actual, swept, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lost, loss, rtol=1e-4, atol=1e-6)


def test_a_card_takes_the_kernel() -> None:
    column_sweep.use_on_cards()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("bitmend::feed_back_block_", "CUDA")


def test_what_the_kernel_does_not_take_is_named(device: str) -> None:
    a, one = torch.zeros(32, 8, device=device), torch.zeros(8, device=device)
    group = torch.zeros(32, dtype=torch.int64, device=device)
    rest = (torch.zeros(1, 8, device=device), torch.zeros(1, 8, device=device), group, None, None, 0, 32, 15, False, 0.0)
    with pytest.raises(TypeError, match=r"weight is torch\.float64"):
        column_sweep.feed_back_block_(a.double(), a, a, one, torch.eye(32), torch.ones(32), *rest)
    with pytest.raises(ValueError, match="levels has strides"):
        column_sweep.feed_back_block_(a, torch.zeros(8, 32, device=device).T, a, one, torch.eye(32), torch.ones(32), *rest)
