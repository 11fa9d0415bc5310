"""Values in parts: on a mesh of one process the parts are the whole, and FSDP's way through the loop must leave what the plain one leaves.
Several processes: tests/pipelines/stages/test_sharded_state.py."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bitmend.recover.peers import Peers
from bitmend.recover.sharded import clip_, is_part, local, replicated, shard, whole
from bitmend.recover.train import Hooks, TrainingText, train

from .conftest import batch, held_out
from .test_train import start


@pytest.fixture
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "kind", "settings"), [
    ("full", "pruned", {"embeddings": True, "accumulation": 2}), ("qat", "3-bit", {"gradient_checkpointing": True}),
])  # fmt: skip
def test_the_loop_over_parts_is_the_loop_over_the_whole(name: str, kind: str, settings: dict[str, Any], mesh: Any) -> None:
    plain, attached, config = start(name, kind, **settings)
    states: list[Any] = []
    expected = train(plain, attached, TrainingText(batch, held_out()), config, hooks=Hooks(save=states.append, save_every=4))
    for resume in (None, states[0]):
        model, parts, _ = start(name, kind, **settings)
        shard(model, parts, mesh)
        inside = {key: t.parameter for key, t in parts.trainables.items() if "layers" in key}
        assert inside and all(map(is_part, inside.values())) and all(p.requires_grad for p in inside.values())
        assert replicated({key: t.parameter for key, t in parts.trainables.items()}).keys() == parts.trainables.keys() - inside.keys()
        if resume is not None:
            resume = type(resume)({key: _like(parts, key, tensor) for key, tensor in resume.tensors.items()}, resume.meta)
        actual = train(model, parts, TrainingText(batch, held_out()), config, resume=resume, hooks=Hooks(peers=Peers(even=True)))
        for one, other in zip(actual.history, expected.history, strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        assert actual.best_step == expected.best_step and actual.best_loss == pytest.approx(expected.best_loss, rel=1e-6)
        for key, trainable in parts.trainables.items():
            assert torch.allclose(whole(trainable.parameter.detach()), attached.trainables[key].parameter.detach(), atol=1e-6), key


def _like(parts: Any, key: str, tensor: torch.Tensor) -> torch.Tensor:
    made = torch.zeros_like(parts.trainables[key.partition(".")[2]].parameter.detach())
    local(made).copy_(tensor)
    return made


def test_plain_gradients_are_clipped_as_torch_clips_them() -> None:
    actual = []
    for clip in (torch.nn.utils.clip_grad_norm_, clip_):
        parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.arange(3.0)
        actual.append((clip(parameters, 1.0), parameters[1].grad))
    assert all(torch.equal(one, other) for one, other in zip(*actual, strict=True))


def test_parts_are_clipped_by_the_norm_of_all(mesh: Any) -> None:
    from torch.distributed.tensor import distribute_tensor

    def gradients(spread: bool) -> list[torch.nn.Parameter]:
        values = [torch.arange(6.0), torch.full((4,), 2.0)]
        parameters = [torch.nn.Parameter(distribute_tensor(v, mesh) if spread and i == 0 else v.clone()) for i, v in enumerate(values)]
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        return parameters

    ours, plain = gradients(True), gradients(False)
    for limit in (0.0, 100.0, 1.5):
        norm, wanted = clip_(ours, limit), torch.nn.utils.clip_grad_norm_(plain, limit or float("inf"))
        assert float(norm) == pytest.approx(float(wanted))
        for one, other in zip(ours, plain, strict=True):
            assert one.grad is not None and other.grad is not None and torch.allclose(local(one.grad), other.grad)
