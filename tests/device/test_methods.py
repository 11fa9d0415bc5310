"""Every method of every stage on the pretended card, in the dtype that a card takes by itself: bfloat16. Nothing is left behind on the CPU.

A new row of a literal dict is tested by being there.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.methods import DECOMPOSE, PRUNE, QUANTIZE
from bitmend.compress.statistics import LayerStatistics
from bitmend.recover.recovery_methods import RECOVER, refusal
from bitmend.reports.record import RunRecord

from ..pipelines.families import save_speaking
from .conftest import PARENTS, RTN, Running

pytestmark = pytest.mark.usefixtures("card")

SHORT: dict[str, Any] = {"steps": 2, "batch_size": 1, "seq_len": 16}
KINDS = {"quantized": {"uniform"}, "decomposed": {"uniform", "low_rank"}, "pruned": {"dense", "masked"}}
dtypes = pytest.mark.parametrize("dtype", ["auto", "float32"])
float32_in_proofs = pytest.mark.parametrize("dtype", ["auto", pytest.param("float32", marks=pytest.mark.slow)])


def whole(made: RunRecord, method: str) -> None:
    """The last stage is the method's, the model still speaks, and the card's memory was counted."""
    last = made.stages[-1]
    assert last.method == method and last.perplexity is not None and math.isfinite(last.perplexity)
    assert last.perplexity < 3 * (made.stages[0].perplexity or 0)
    assert last.peak_bytes is not None and 100_000 < last.peak_bytes < last.metrics["host_peak_bytes"]


@float32_in_proofs
@pytest.mark.parametrize("method", PRUNE)
def test_prune(method: str, dtype: str, ran: Running) -> None:
    whole(ran("dense", [{"prune": {"method": method, "sparsity": 0.3}}], dtype), method)


@float32_in_proofs
@pytest.mark.parametrize("method", QUANTIZE)
def test_quantize(method: str, dtype: str, ran: Running) -> None:
    few = {"steps": 2, "batch_size": 1} if QUANTIZE[method].scope == "block" else {}
    whole(ran("dense", [{"quantize": {"method": method, **few}}], dtype), method)


@float32_in_proofs
@pytest.mark.parametrize("method", DECOMPOSE)
def test_decompose(method: str, dtype: str, ran: Running) -> None:
    few = {"iterations": 1} if "iterations" in DECOMPOSE[method].config.__dataclass_fields__ else {}
    rank = {} if method == "svdquant" else {"rank": 2}
    stage = {"decompose": {"method": method, **rank, **few, "ignore": ["gate", "up", "v_proj"]}}
    whole(ran("quantized", [*PARENTS["quantized"], stage], dtype), method)


def parent_of(method: str) -> str:
    """The first kind of compressed model that a recovery method serves."""
    return next(name for name, kinds in KINDS.items() if refusal(method, [frozenset(kinds)], RECOVER[method].config()) is None)


def settings_of(method: str) -> dict[str, Any]:
    known = RECOVER[method].config.__dataclass_fields__
    wanted = {**SHORT, "eval_every": 2, "samples": 2, **({"rank": 2} if method != "perp" else {})}  # perp has none unless asked for pairs
    return {key: value for key, value in wanted.items() if key in known}


@float32_in_proofs
@pytest.mark.parametrize("method", RECOVER)
def test_recover(method: str, dtype: str, ran: Running) -> None:
    parent = parent_of(method)
    whole(ran(parent, [*PARENTS[parent], {"recover": {"method": method, **settings_of(method)}}], dtype), method)


def test_a_chain_in_float16(ran: Running) -> None:
    """What `auto` is on a card before Ampere."""
    stages = [{"prune": {"method": "wanda", "sparsity": 0.3}}, {"quantize": {"method": "gptq", "bits": 4, "group_size": 32}}]
    stages += [{"decompose": {"method": "qera_exact", "rank": 2}}, {"recover": {"method": "lora", **SHORT}}, {"fuse": {"backend": "reference"}}]
    whole(ran("half", stages, "float16"), "bind")


@pytest.mark.parametrize("method", ["fish_mask"])
def test_recover_by_second_order(method: str, ran: Running) -> None:
    own = {"criterion": "saliency", "reestimate_every": 1}
    whole(ran("quantized", [RTN, {"recover": {"method": method, **settings_of(method), **own}}]), method)


def test_experts(ran: Running, small_model: Path, tmp_path: Path) -> None:
    save_speaking("mixtral", tmp_path / "source", small_model, num_hidden_layers=1, num_local_experts=2)
    stages = [
        {"prune": {"method": "wanda", "sparsity": 0.3}},
        {"quantize": {"method": "gptq", "bits": 4, "group_size": 16}},
        {"decompose": {"method": "qera_exact", "rank": 2}},
        {"recover": {"method": "lora", **SHORT}},
    ]
    whole(ran("experts", stages, model=tmp_path / "source"), "lora")


@dtypes
def test_rounded_inputs_and_kernels(dtype: str, ran: Running) -> None:
    """W4A8, trained, then on Triton's kernels (the interpreter multiplies no bfloat16)."""
    stages = [
        {
            "quantize": {
                "method": "rtn",
                "group_size": 32,
                "activations": {"bits": 8, "group_size": 32},
                "ignore": ["gate", "up", "[kvo]_proj"],
            }
        },
        {"recover": {"method": "lora", "rank": 2, **SHORT}},
        {"fuse": {"backend": "triton" if dtype == "float32" else "reference", "integer_scales": True}},
    ]
    made = ran("activations", stages, dtype)
    assert "scales of 2 matrices are whole numbers times one float an output" in made.stages[-1].notes[0]
    assert [s.method for s in made.stages[1:3]] == ["rtn", "lora"] and made.stages[-1].stage == "fuse"


def test_a_method_that_leaves_a_tensor_behind_fails_by_its_operator(ran: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of these tests."""
    row = PRUNE["magnitude"]

    def careless(weight: Any, target_OI: torch.Tensor, statistics: LayerStatistics, config: Any) -> Any:
        return row.function(weight, target_OI * torch.ones(target_OI.shape[1]), statistics, config)

    monkeypatch.setitem(PRUNE, "magnitude", type(row)(row.config, careless, row.needs))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"same device, but aten::mul.Tensor was given cuda:0 \[\d+, \d+\], cpu \[\d+\]"):
        ran("careless", [{"prune": {"method": "magnitude", "sparsity": 0.3}}])
