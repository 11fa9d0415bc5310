"""Operators are counted one by one: views, copies between devices and waits apart, each in its part of the stage."""

from pathlib import Path

import pytest
import torch
from bitmend.pipelines.bench import benchmarks, operator_counts
from bitmend.pipelines.bench.benchmarks import Options
from bitmend.pipelines.bench.operator_counts import Counter, OperatorCount
from bitmend.pipelines.bench.synthetic import Shape
from bitmend.pipelines.errors import UsageError

TINY = Shape(2, 64, 128, 4, 2, 96)


def work(weight: torch.Tensor) -> torch.Tensor:
    on_card = weight.to("cuda")  # detach, move
    product = on_card @ on_card.T  # t, mm
    product[product > 0].sum().item()  # gt, index by a mask, sum, _local_scalar_dense
    return product.cpu()  # detach, move


def test_an_operator_is_one_and_a_wait_is_one(card: object) -> None:
    weight = torch.eye(4)
    with Counter({work.__code__: "work"}) as counter:
        work(weight)
        weight.add(1)  # outside of every part
    read = 64 + 128 + 64 + (64 + 16) + 16 + 4 + 64
    assert counter.counts == {"work": OperatorCount(10, 3, read, 128, 3)}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_block_is_counted_by_part(device: str, card: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operator_counts.SHAPES, "tiny", TINY)
    measured = benchmarks.run("compress", Options(device, output=tmp_path, shape="tiny", count=True))
    rows = {row["part"]: row for row in measured["rows"] if row["method"] == "gptq"}
    steps = [row for row in measured["rows"] if row["part"] == "step"]
    assert [row["method"] for row in steps] == ["scales", "lora"] and all(row["operators"] > 500 for row in steps)
    assert all(row["waits"] == 0 for row in steps), "the host waits for nothing within a step"
    assert list(rows) == ["statistics", "factor", "clip search", "sweep", "packing", "error", "rest of the solver", "model", "solver"]
    parts = [row["operators"] for part, row in rows.items() if part not in ("statistics", "model", "solver")]
    assert rows["solver"]["operators"] == sum(parts)
    if device == "cuda":  # one operator and one product a block of columns, one piece a search
        assert rows["sweep"]["operators"] <= 60 and rows["clip search"]["operators"] <= 1100 and rows["solver"]["operators"] <= 2500
    assert rows["model"]["copied_bytes"] > 0 if device == "cuda" else all(row["copied_bytes"] == 0 for row in rows.values())
    assert (tmp_path / f"bench-compress-count-tiny-{device}.json").is_file()
    with pytest.raises(UsageError, match="nothing is left to count: name another -o"):
        benchmarks.run("compress", Options(device, output=tmp_path, shape="tiny", count=True))


def test_what_cannot_be_counted_is_refused() -> None:
    for options in (Options("cpu", count=True, blocks=2, shape="1b"), Options("cpu", count=True, depths=(2,))):
        with pytest.raises(UsageError, match="--count counts the operators of one block"):
            benchmarks.run("compress", options)
    with pytest.raises(UsageError, match="did you mean 'gptq'"):
        benchmarks.run("compress", Options("cpu", count=True, only=("gtpq",)))
