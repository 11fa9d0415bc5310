"""What the pretended card pretends: its tensors meet no others, forward or backward, and are counted."""

import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from .pretended import Card, OnCard, pretended_cuda

pytestmark = pytest.mark.usefixtures("card")


def test_what_is_sent_is_there_and_comes_back() -> None:
    x = torch.arange(6.0).view(2, 3)
    there = x.to("cuda")
    assert there.device == torch.device("cuda", 0) and there.is_cuda and there[0].device.type == "cuda" and "cuda:0" in repr(there)
    assert there.to("cpu").device.type == there.cpu().device.type == "cpu" and torch.equal(there.cpu(), x)
    there += 1
    assert torch.equal(x, torch.arange(6.0).view(2, 3)) and there.tolist()[0] == [1.0, 2.0, 3.0] and f"{there.sum():.1f}" == "21.0"
    for made in (
        torch.zeros(2, device="cuda"),
        torch.tensor([1.0], device="cuda"),
        torch.zeros_like(there),
        there.new_zeros(2),
        there.float(),
    ):
        assert isinstance(made, OnCard)
    for made in (torch.zeros_like(there, device="cpu"), there.new_zeros(2, device="cpu"), torch.zeros(2), there.to(x)):
        assert not isinstance(made, OnCard)


def test_a_module_goes_there_trains_and_is_copied() -> None:
    layer = nn.Linear(3, 2).to("cuda")
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(4, 3, device="cuda")).square().sum().backward()
    optimizer.step()
    copy = deepcopy(layer)
    for weight in (layer.weight, copy.weight, layer.weight.data):
        assert weight.device.type == "cuda"
    assert isinstance(layer.weight.grad, OnCard) and isinstance(layer.weight, nn.Parameter)
    copy.weight.data.zero_()
    assert bool(layer.weight.any())


def test_gradients_go_back_to_where_a_tensor_came_from() -> None:
    x = torch.ones(3, requires_grad=True)
    (x.to("cuda") * 2).sum().backward()
    assert x.grad is not None and not isinstance(x.grad, OnCard) and x.grad.tolist() == [2.0] * 3
    y = torch.ones(4, 3, device="cuda", requires_grad=True)
    y[:, :2][torch.tensor([0, 1], device="cuda")].cpu().sum().backward()
    assert isinstance(y.grad, OnCard) and float(y.grad.sum()) == 4


MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "aten::mm": lambda here, there: there @ here,
    "aten::add.Tensor": lambda here, there: here + there,
    "aten::add_.Tensor": lambda here, there: here.sum().add_(there.sum()),
    "aten::cat": lambda here, there: torch.cat([here, there]),
    "aten::stack": lambda here, there: torch.stack([here.sum(), there.sum()]),
    "aten::index.Tensor": lambda here, there: here[there[0].long()],
    "aten::index_put_": lambda here, there: there.index_put_((torch.tensor([0]),), here[:1]),
    "aten::embedding": lambda here, there: nn.functional.embedding(here[0].long(), there),
    "aten::where.self": lambda here, there: torch.where(there > 0, here, there),
}


@pytest.mark.parametrize("operator", MIXED)
def test_mixed_devices_are_refused_by_name(operator: str) -> None:
    with pytest.raises(RuntimeError, match=f"same device, but {operator} was given"):
        MIXED[operator](torch.ones(3, 3), torch.ones(3, 3, device="cuda"))


def test_mixed_devices_are_refused_in_backward() -> None:
    class Careless(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0] * torch.full((3,), 2.0)

    y = Careless.apply(torch.ones(3, device="cuda", requires_grad=True))
    with pytest.raises(RuntimeError, match="same device, but aten::mul.Tensor was given"):
        y.sum().backward()  # type: ignore[union-attr]


def test_what_may_meet() -> None:
    there = torch.arange(4.0, device="cuda")
    assert isinstance(there * torch.tensor(2.0), OnCard) and isinstance(there[torch.tensor([1, 0])], OnCard)
    there[torch.tensor([True, False, False, False])] = 5.0
    there[1:].copy_(torch.zeros(3))
    assert there.tolist() == [5.0, 0.0, 0.0, 0.0]


def test_no_numpy_and_no_generator_of_the_other() -> None:
    there = torch.ones(2, device="cuda")
    with pytest.raises(TypeError, match="cuda:0 device type tensor to numpy"):
        there.numpy()
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(2, device="cuda", generator=torch.Generator())
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.rand(2, generator=torch.Generator("cuda"))
    torch.manual_seed(3)
    first, host = torch.rand(2, device="cuda"), torch.get_rng_state()
    torch.cuda.manual_seed_all(3)
    assert torch.equal(first, torch.rand(2, device="cuda")) and torch.equal(host, torch.get_rng_state())


def test_in_a_thread() -> None:
    actual: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: actual.append(torch.ones(2, device="cuda") * 2))
    thread.start()
    thread.join()
    assert isinstance(actual[0], OnCard)


def test_living_bytes_are_counted() -> None:
    torch.cuda.reset_peak_memory_stats()
    kept = torch.zeros(1024, 256, device="cuda")
    view, gone = kept[1:], torch.zeros(512, 1024, device="cuda")
    assert torch.cuda.memory_allocated() == (1 << 20) + (2 << 20)
    del gone, kept
    assert torch.cuda.memory_allocated() == 1 << 20 and torch.cuda.max_memory_allocated() == 3 << 20
    free, total = torch.cuda.mem_get_info()
    assert total - free == 1 << 20 and view.device.type == "cuda"


def test_memory_runs_out() -> None:
    with pretended_cuda(total_memory=1 << 20):
        kept = torch.zeros(3 << 16, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 1.00 MiB.*of which 0.25 MiB is free"):
            torch.zeros(1 << 18, device="cuda")
        assert torch.cuda.memory_allocated() == kept.nbytes


def test_what_a_card_before_ampere_says() -> None:
    with pretended_cuda(capability=(7, 5)):
        assert torch.cuda.get_device_capability() == (7, 5) and not torch.cuda.is_bf16_supported(including_emulation=False)


NOT_DETERMINISTIC: dict[str, Callable[[torch.Tensor], Any]] = {
    "kthvalue": lambda x: x.kthvalue(1),
    "cumsum": lambda x: x.cumsum(0),
    "histc": lambda x: x.histc(2),
    "bincount": lambda x: torch.bincount(x.long(), weights=x),
    "median": lambda x: x.median(0),
    "put_": lambda x: x.put_(torch.tensor([0], device="cuda"), torch.ones(1, device="cuda")),
    "scatter_reduce": lambda x: x.scatter_reduce(0, torch.zeros(4, dtype=torch.long, device="cuda"), x, "prod"),
}


@pytest.mark.parametrize("operator", NOT_DETERMINISTIC)
def test_what_is_not_deterministic_on_a_card_is_refused_there(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, x = NOT_DETERMINISTIC[operator], torch.arange(4.0, device="cuda")
    run(x.clone())
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=f"{operator}.* does not have a deterministic implementation"):
            run(x)
        assert x.long().cumsum(0).tolist() == [0, 1, 3, 6] and float(x.median()) == 1
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        with pytest.raises(RuntimeError, match="CUBLAS_WORKSPACE_CONFIG"):
            torch.dot(x, x)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        assert float(x @ x) == 14
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_stays_behind(card: Card) -> None:
    """Outside, torch is as it was."""
    before = torch.Tensor.to
    with pretended_cuda(total_memory=5) as inner:
        assert torch.cuda.get_device_properties(0).total_memory == 5 and inner is not card
    assert torch.cuda.get_device_properties(0).total_memory == card.total_memory and torch.Tensor.to is before
