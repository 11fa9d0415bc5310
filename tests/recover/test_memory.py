"""What training holds is what it says: packed weights, one dense layer, trainable state, the rest. Counted by tensors, not by the process."""

import gc
from typing import Any

import pytest
import torch
from bitmend.recover.compressed_linear import CompressedLinear
from bitmend.recover.compressed_model import cache_dense, compressed_linears
from bitmend.recover.memory import training_memory
from bitmend.recover.recovery_methods import attach, config_of
from bitmend.recover.train import Hooks, TrainingText, train

from .conftest import batch, compressed, held_out

SETTINGS = {"steps": 3, "loss": "cross_entropy", "eval_every": 1, "warmup": 0, "rank": 4}


def alive() -> dict[int, int]:
    """Storage → bytes of every tensor there is."""
    gc.collect()
    actual = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in actual}


@pytest.mark.parametrize(("method", "kind"), [("qlora", "nf4-nested"), ("qlora", "3-bit"), ("lq_lora", "lq"), ("lora", "2:4+4-bit")])
def test_tensors_alive_while_training(method: str, kind: str) -> None:
    before = alive()
    model = compressed(kind)
    attached = attach(method, model, SETTINGS)
    assert not cache_dense(compressed_linears(model), 0)
    memory = training_memory(model, attached)
    texts, checks, seen = [batch(i) for i in range(3)], held_out(1), []
    text_bytes = sum(b.ids.numel() * 8 for b in (*texts, *checks))

    def count(progress: Any) -> None:
        seen.append(sum(size for place, size in alive().items() if place not in before))

    train(model, attached, TrainingText(texts.__getitem__, checks), config_of(method, SETTINGS), hooks=Hooks(progress=count))
    limit = sum(memory.values()) + text_bytes
    assert len(seen) == 3 and max(seen) <= limit
    assert max(seen) > 0.7 * (limit - memory["dense_bytes"]), "and it says no more than there is"


def test_a_dense_matrix_is_alive_only_while_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward rebuild one layer at a time; nothing dense waits for backward."""
    model = compressed("nf4-nested")
    attached = attach("qlora", model, SETTINGS)
    sizes = {linear.out_features * linear.in_features for linear in compressed_linears(model).values()}
    plain, built, most = CompressedLinear.base, [], []

    def base(linear: CompressedLinear) -> torch.Tensor:
        made = plain(linear)
        built.append(made.untyped_storage().data_ptr())
        dense = [
            t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.dtype == torch.float32 and t.numel() in sizes and t.dim() == 2
        ]
        most.append(len({t.untyped_storage().data_ptr() for t in dense if t.untyped_storage().data_ptr() in built}))
        return made

    monkeypatch.setattr(CompressedLinear, "base", base)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        model(batch(0).ids).logits.square().mean().backward()
    assert len(built) == 2 * len(compressed_linears(model)) - 3, "the first q, k and v hand no gradient on"
    assert max(most) == 1
    assert attached.count() > 0 and saved


def test_kept_dense_matrices_are_counted() -> None:
    model = compressed("3-bit")
    attached = attach("lora", model, {"rank": 4})
    linears = compressed_linears(model)
    assert training_memory(model, attached)["dense_bytes"] == max(lin.out_features * lin.in_features * 4 for lin in linears.values())
    whole = sum(lin.out_features * lin.in_features * 4 for lin in linears.values())
    assert cache_dense(linears, 1e9) == whole == training_memory(model, attached)["dense_bytes"]
    plain = compressed("dense")
    assert training_memory(plain, attach("lora", plain, {"rank": 4}))["dense_bytes"] == 0, "what lies dense is not rebuilt"
