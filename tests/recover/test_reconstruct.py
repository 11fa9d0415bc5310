"""Reconstruction of one block: never worse, masks untouched, attention and MLP apart or together."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from bitmend.compress.block import BlockProblem
from bitmend.compress.weights import DenseWeight
from bitmend.recover.merge import audit
from bitmend.recover.reconstruct import Reconstruct, block_error, reconstruct
from torch.func import functional_call

from .conftest import batch, compress, llama

NAMES = tuple(f"self_attn.{n}_proj" for n in "qkvo") + tuple(f"mlp.{n}_proj" for n in ("gate", "up", "down"))


def problem(kind="2:4", **terms) -> Any:
    model = llama()
    block, ids = model.model.layers[0], torch.cat([batch(i).ids for i in range(4)])
    hidden = model.model.embed_tokens(ids).detach()
    positions = model.model.rotary_emb(hidden, torch.arange(ids.shape[1]).unsqueeze(0))
    targets = {name: block.get_submodule(name).weight.detach().clone() for name in NAMES}

    def forward(matrices, x):
        out = functional_call(block, {f"{n}.weight": w for n, w in matrices.items()}, (x,), {"position_embeddings": positions})
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        outputs = forward(targets, hidden)
    weights = {name: replace(compress(w, kind), **terms) for name, w in targets.items()}
    return BlockProblem(weights, targets, forward, hidden, outputs, {})


@pytest.mark.parametrize("trains", ["weights", "mask_lora"])
@pytest.mark.parametrize("window", ["block", "halves"])
def test_the_error_falls_and_masks_stay(trains, window):
    given = problem()
    config = Reconstruct(trains=trains, window=window, steps=60, rank=8, learning_rate=5e-3)
    records: Any
    records, metrics = reconstruct(given, dict.fromkeys(NAMES, config))
    assert audit(given.weights, records) == []
    before = block_error(given, {n: r.dense() for n, r in given.weights.items()})
    after = block_error(given, {n: r.dense() for n, r in records.items()})
    assert metrics[NAMES[0]]["block_error_before"] == pytest.approx(before)
    assert after == pytest.approx(metrics[NAMES[0]]["block_error_after"], rel=1e-4)
    assert after < 0.8 * before
    again: Any = reconstruct(problem(), dict.fromkeys(NAMES, config))[0]
    assert all(torch.equal(records[n].base.weight, again[n].base.weight) for n in NAMES)


def test_a_rate_that_only_destroys_leaves_the_records_alone():
    given = problem()
    records, metrics = reconstruct(given, dict.fromkeys(NAMES, Reconstruct(steps=5, learning_rate=100.0)))
    assert records == given.weights
    assert metrics[NAMES[0]]["block_error_after"] == metrics[NAMES[0]]["block_error_before"]


def test_smoothing_and_low_rank_terms_stay_beside_the_base():
    smooth = torch.linspace(0.5, 2, 32)
    given = problem()
    given.weights["self_attn.q_proj"] = replace(
        given.weights["self_attn.q_proj"], smooth=smooth, base=DenseWeight(given.weights["self_attn.q_proj"].base.weight * smooth)
    )
    records: Any
    records, _ = reconstruct(
        given, {"self_attn.q_proj": Reconstruct(steps=20, window="block"), "self_attn.k_proj": Reconstruct(steps=20, window="block")}
    )
    assert records["mlp.up_proj"] is given.weights["mlp.up_proj"]
    assert torch.equal(records["self_attn.q_proj"].smooth, smooth)
    assert audit(given.weights, records) == []


def test_a_quantized_base_is_refused():
    with pytest.raises(ValueError, match="use block_training"):
        reconstruct(problem("3-bit"), dict.fromkeys(NAMES, Reconstruct(steps=1)))
