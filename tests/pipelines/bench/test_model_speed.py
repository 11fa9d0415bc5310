"""bench generate --shape: every variant writes and reads on the kernels, a stopped benchmark goes on, what it cannot do is refused."""

import json
from pathlib import Path

import pytest
import torch
from bitmend.compress.weights import ActivationGrid
from bitmend.kernels.layout import tile
from bitmend.kernels.linear import bind
from bitmend.kernels.operators import ReferenceOperator
from bitmend.pipelines.bench import benchmarks, model_speed, synthetic
from bitmend.pipelines.bench.benchmarks import Options
from bitmend.pipelines.errors import UsageError

TINY = synthetic.Shape(2, 64, 128, 4, 2, 96)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "choices"))
    monkeypatch.setitem(synthetic.SHAPES, "tiny", TINY)
    for name, value in (("NEW_TOKENS", 2), ("PROMPT", 3), ("READ", 8)):
        monkeypatch.setattr(model_speed, name, value)


def test_every_variant_writes_and_reads(tmp_path: Path) -> None:
    actual = benchmarks.run("generate", Options(device="cpu", shape="tiny", blocks=1, repeats=2, output=tmp_path))
    rows = {(row["variant"], row["regime"]): row for row in actual["rows"]}
    assert list(rows) == [(variant, regime) for variant in model_speed.VARIANTS for regime in ("decode", "prefill")]
    assert all(row["milliseconds"] > 0 and row["blocks"] == 1 and row["tokens_per_second"] > 0 for row in rows.values())
    for (_, regime), row in rows.items():
        assert row["tokens"] == (1 if regime == "decode" else 8)
        assert row["times_bfloat16"] == round(row["milliseconds"] / rows["bfloat16", regime]["milliseconds"], 3)
    assert rows["bfloat16", "decode"]["backends"] == "" and rows["4 bits", "decode"]["backends"].endswith(" 7")
    assert rows["4 bits", "decode"]["resident_bytes"] < rows["4 bits, rank 32", "decode"]["resident_bytes"]
    written = json.loads((tmp_path / "bench-generate-shape-tiny.json").read_text())
    assert written["rows"] == actual["rows"] and not (tmp_path / model_speed.JOURNAL).exists()
    assert "| 4 bits, rank 32" in (tmp_path / "bench-generate-shape-tiny.md").read_text()


def test_one_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one(variant: str, form: object, *_: object) -> list[dict[str, object]]:
        asked.append(variant)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return [{"variant": variant, "regime": "decode", "milliseconds": float(len(asked))}]

    asked: list[str] = []
    monkeypatch.setattr(model_speed, "measured", one)
    chosen = ("tiny", None, (), "cpu", 1, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        model_speed.of_shape(*chosen)
    rows = model_speed.of_shape(*chosen)
    assert asked == [list(model_speed.VARIANTS)[i] for i in (0, 1, 1, 2, 3)]
    assert [row["times_bfloat16"] for row in rows] == [1.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("variant", ["4 bits, rank 32", "W4A8, two levels, rank 32"])
def test_blocks_share_numbers_and_no_memory(variant: str) -> None:
    form = model_speed.VARIANTS[variant]
    model, _ = model_speed.made(TINY, form, CPU)
    first, second = (block.mlp.down_proj for block in model.model.layers)
    x = torch.randn(3, 128)
    assert torch.equal(first(x), second(x))
    assert not {t.data_ptr() for t in first.bound_tensors()} & {t.data_ptr() for t in second.bound_tensors()}
    assert form is not None
    stored = model_speed.record((64, 128), form, torch.Generator().manual_seed(0), CPU)
    assert stored.activations == (ActivationGrid(8, -1) if form.rounds else None)
    assert (tile(stored.base).two_levels is None) != form.rounds
    torch.testing.assert_close(bind(stored)(x), ReferenceOperator(stored, None)(x), rtol=0.02, atol=0.02)


def test_refusals() -> None:
    for options, words in (
        (Options(shape="9b"), "--shape: "),
        (Options(shape="tiny", only=("5 bits",)), "variant '5 bits'"),
        (Options(shape="tiny", model="demo"), "makes a model of its own"),
        (Options(blocks=2), "--blocks says how many blocks of a --shape"),
    ):
        with pytest.raises(UsageError, match=words):
            benchmarks.run("generate", options)
