"""weight_only_matmul_up: odd shapes against float64, memory that lies, equal runs, gradients, refusals."""

from collections.abc import Callable

import pytest
import torch
from bitmend.compress.weights import NormalFloatWeight, UniformWeight
from bitmend.kernels import reference
from bitmend.kernels.layout import TiledWeight, tile
from bitmend.kernels.weight_only_matmul_up import weight_only_matmul_up
from torch import Tensor

DTYPES = [torch.float16, torch.float32, *([torch.bfloat16] if torch.cuda.is_available() else [])]
SMALL_ROWS = 64  # up to here the interpreter splits the inputs
ROWS = [1, 5, 17, SMALL_ROWS + 3]


def operands(m: int, out: int, inputs: int, rank: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    made = (torch.randn(m, inputs), torch.randn(out, rank) / rank**0.5, torch.randn(rank, inputs) / inputs**0.5)
    return *(t.to(dtype).to(device) for t in made), torch.randn(out, device=device)


def eager(x: Tensor, weight: TiledWeight, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return x @ weight.dense(x.dtype).t() + (x @ down.t()) @ up.t() + bias.to(x.dtype)


def truth(x: Tensor, weight: TiledWeight, up: Tensor, down: Tensor, bias: Tensor) -> Tensor:
    return reference.weight_only_matmul_up(x.double(), weight, None, up, bias, down_RI=down, compute=torch.float64)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_uniform_grids(
    bits: int, rows: int, dtype: torch.dtype, device: str, uniform: Callable[..., UniformWeight], within_budget: Callable[..., None]
) -> None:
    weight = tile(uniform(77, 192, bits)).to(device)
    x, up, down, bias = operands(rows, 77, 192, 24, dtype, device)
    y = weight_only_matmul_up(x, weight, None, up, bias, lora_down=down)
    assert y.dtype == dtype and y.shape == (rows, 77)
    within_budget(y, eager(x, weight, up, down, bias), truth(x, weight, up, down, bias))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [3, SMALL_ROWS + 1])
@pytest.mark.parametrize("out, inputs, group", [(1, 16, 16), (33, 77, 77), (130, 80, -1), (65, 96, 32), (16, 640, 128)])
def test_odd_shapes(
    out: int, inputs: int, group: int, rows: int, device: str, uniform: Callable[..., UniformWeight], within_budget: Callable[..., None]
) -> None:
    weight = tile(uniform(out, inputs, 4, group)).to(device)
    x, up, down, bias = operands(rows, out, inputs, 8, torch.float16, device)
    y = weight_only_matmul_up(x, weight, None, up, bias, lora_down=down)
    within_budget(y, eager(x, weight, up, down, bias), truth(x, weight, up, down, bias))


@pytest.mark.parametrize("rows", [2, SMALL_ROWS + 1])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_code_books(
    bits: int, rows: int, device: str, normal_float: Callable[..., NormalFloatWeight], within_budget: Callable[..., None]
) -> None:
    weight = tile(normal_float(40, 128, bits)).to(device)
    x, up, down, bias = operands(rows, 40, 128, 8, torch.float16, device)
    y = weight_only_matmul_up(x, weight, None, up, bias, lora_down=down)
    within_budget(y, eager(x, weight, up, down, bias), truth(x, weight, up, down, bias))


@pytest.mark.parametrize("rows", [2, SMALL_ROWS + 1])
def test_symmetric_and_floating_zeros(
    rows: int, device: str, uniform: Callable[..., UniformWeight], within_budget: Callable[..., None]
) -> None:
    plain = uniform(40, 128)
    floating = UniformWeight.from_codes(plain.codes_OI(), plain.scales, plain.zeros_OG() + torch.rand(40, 2) - 0.5, 4, 64)
    for base in (uniform(40, 128, 4, 64, True), floating):
        weight = tile(base).to(device)
        x = torch.randn(rows, 128, device=device).half()
        y = weight_only_matmul_up(x, weight)
        within_budget(y, x @ weight.dense(torch.float16).t(), x.double() @ weight.dense(torch.float64).t())


@pytest.mark.parametrize("rank", [8, 40, 256])
@pytest.mark.parametrize("rows", [2, SMALL_ROWS + 1])
def test_ranks_and_given_h(
    rank: int, rows: int, device: str, uniform: Callable[..., UniformWeight], within_budget: Callable[..., None]
) -> None:
    weight = tile(uniform(48, 64)).to(device)
    x, up, down, bias = operands(rows, 48, 64, rank, torch.float16, device)
    exact = truth(x, weight, up, down, bias)
    partial = torch.stack((x[:, :32].float() @ down[:, :32].float().t(), x[:, 32:].float() @ down[:, 32:].float().t()))
    for h in (partial, partial.sum(0), (x @ down.t())):
        within_budget(weight_only_matmul_up(x, weight, h, up, bias), eager(x, weight, up, down, bias), exact)


@pytest.mark.parametrize("rows", [2, SMALL_ROWS + 1])
def test_bfloat16(rows: int, device: str, uniform: Callable[..., UniformWeight], within_budget: Callable[..., None]) -> None:
    """In the interpreter, whose bfloat16 products are garbage, it is computed in float32."""
    weight = tile(uniform(48, 64)).to(device)
    x, up, down, bias = operands(rows, 48, 64, 8, torch.bfloat16, device)
    y = weight_only_matmul_up(x, weight, None, up, bias, lora_down=down)
    assert y.dtype == torch.bfloat16
    within_budget(y, eager(x, weight, up, down, bias), truth(x, weight, up, down, bias))


@pytest.mark.parametrize("rows", [3, SMALL_ROWS + 1])
def test_segments_read_their_own_ranks(rows: int, device: str, uniform: Callable[..., UniformWeight]) -> None:
    weight = tile(uniform(100, 64)).to(device)
    x, up, down, _ = operands(rows, 100, 64, 24, torch.float32, device)
    segments = ((0, 37, 0, 8), (37, 13, 8, 0), (50, 50, 8, 16))
    y = weight_only_matmul_up(x, weight, None, up, lora_down=down, segments=segments)
    h, base = x @ down.t(), x @ weight.dense().t()
    expected = torch.cat((base[:, :37] + h[:, :8] @ up[:37, :8].t(), base[:, 37:50], base[:, 50:] + h[:, 8:24] @ up[50:, :16].t()), dim=1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [4, SMALL_ROWS + 6])
def test_strides_do_not_matter_and_runs_agree_to_the_bit(rows: int, device: str, uniform: Callable[..., UniformWeight]) -> None:
    weight = tile(uniform(77, 192, 3)).to(device)
    x, up, down, bias = operands(rows, 77, 192, 8, torch.float16, device)
    first = weight_only_matmul_up(x, weight, None, up, bias, lora_down=down)
    scattered = torch.randn(192, 2 * rows, device=device).half()[:, ::2].t()
    scattered.copy_(x)
    assert not scattered.is_contiguous()
    strided = torch.stack((bias, bias), 1)[:, 0]
    again = weight_only_matmul_up(scattered, weight, None, up.t().contiguous().t(), strided, lora_down=down.t().contiguous().t())
    assert torch.equal(first, again)
    assert torch.equal(first, weight_only_matmul_up(x, weight, None, up, bias, lora_down=down))


@pytest.mark.parametrize("rows", [3, SMALL_ROWS + 1])
@pytest.mark.parametrize("given", ["lora_down", "h", "partial h"])
def test_gradients_are_those_of_the_reference(rows: int, given: str, device: str, uniform: Callable[..., UniformWeight]) -> None:
    weight = tile(uniform(50, 96, 3, 32)).to(device)
    x, up, down, bias = (t.requires_grad_() for t in operands(rows, 50, 96, 16, torch.float32, device))
    h = None if given == "lora_down" else torch.randn(*((2,) if given == "partial h" else ()), rows, 16, device=device, requires_grad=True)
    leaves = [x, up, bias, down if h is None else h]
    segments = ((0, 20, 0, 8), (20, 30, 0, 16))
    upstream = torch.randn(rows, 50, device=device)
    got = torch.autograd.grad(
        weight_only_matmul_up(x, weight, h, up, bias, lora_down=None if h is not None else down, segments=segments), leaves, upstream
    )
    slow = reference.weight_only_matmul_up(x, weight, h, up, bias, down_RI=down, segments=segments)
    for ours, theirs in zip(got, torch.autograd.grad(slow, leaves, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_refusals_name_the_argument(device: str, uniform: Callable[..., UniformWeight]) -> None:
    weight = tile(uniform(48, 64)).to(device)
    x, up, down, bias = operands(2, 48, 64, 8, torch.float16, device)
    with pytest.raises(ValueError, match="x has 63 columns; expected 64"):
        weight_only_matmul_up(x[:, :63], weight)
    with pytest.raises(ValueError, match=r"x has shape \(64,\)"):
        weight_only_matmul_up(x[0], weight)
    with pytest.raises(TypeError, match=r"x is torch\.int32"):
        weight_only_matmul_up(x.int(), weight)
    with pytest.raises(ValueError, match=r"bias has shape \(47,\); expected \(48,\)"):
        weight_only_matmul_up(x, weight, bias=bias[:47])
    with pytest.raises(ValueError, match="lora_up has 47 rows; expected 48"):
        weight_only_matmul_up(x, weight, None, up[:47], lora_down=down)
    with pytest.raises(ValueError, match="lora_up has rank 264"):
        weight_only_matmul_up(x, weight, None, up.repeat(1, 33), lora_down=down.repeat(33, 1))
    with pytest.raises(ValueError, match="lora_up has rank 7"):
        weight_only_matmul_up(x, weight, None, up[:, :7], lora_down=down)
    with pytest.raises(ValueError, match="lora_down has 60 columns"):
        weight_only_matmul_up(x, weight, None, up, lora_down=down[:, :60])
    with pytest.raises(ValueError, match=r"h has shape \(3, 8\)"):
        weight_only_matmul_up(x, weight, torch.zeros(3, 8, device=device), up)
    with pytest.raises(ValueError, match="h has 0 ranks"):
        weight_only_matmul_up(x, weight, torch.zeros(2, 0, device=device), up)
    with pytest.raises(ValueError, match="neither is given"):
        weight_only_matmul_up(x, weight, None, up)
    with pytest.raises(ValueError, match="without lora_up"):
        weight_only_matmul_up(x, weight, lora_down=down)
    with pytest.raises(ValueError, match="segments"):
        weight_only_matmul_up(x, weight, None, up, lora_down=down, segments=((0, 30, 0, 8), (20, 10, 0, 8)))
    with pytest.raises(ValueError, match="bias is on meta; expected"):
        weight_only_matmul_up(x, weight, bias=bias.to("meta"))
