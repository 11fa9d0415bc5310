"""What a stage reads from disk: every tensor of a block once, whoever needs it, and the next block's while the present one is computed on."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines import stages
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.reading import BlockReader, in_background
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages.writing import InPlace
from bitmend.pipelines.store.artifact import Artifact
from bitmend.recover.compressed_linear import CompressedLinear

from ..families import save_speaking
from ..runs import chosen

CPU = torch.device("cpu")
QUANTIZE = {"bits": 3, "group_size": 32}
CHAINS: dict[str, list[dict[str, Any]]] = {
    "two_blocks": [{"quantize": {"method": "learned_rounding", "window": "two_blocks", "steps": 1, **QUANTIZE}}],
    "dense_follows": [
        {"prune": {"method": "wanda", "sparsity": 0.3}},
        {"quantize": {"method": "gptq", "correction": 0.5, "true_sequential": True, **QUANTIZE}},
        {"decompose": {"method": "qera_exact", "rank": 2}},
    ],
}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, str]]]:
    """(directory, tensor) → how often it was read from disk while a stage was at work."""
    counted: Counter[tuple[str, str]] = Counter()
    working = threading.Event()
    plain, perform = Artifact._open, stages.perform

    class Counting:
        def __init__(self, place: str, shard: Any):
            self.place, self.shard = place, shard

        def __enter__(self) -> "Counting":
            self.inside = self.shard.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.shard.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inside, name)

        def get_tensor(self, name: str) -> torch.Tensor:
            if working.is_set():
                counted[self.place, name] += 1
            return self.inside.get_tensor(name)

    def performed(*arguments: Any) -> Any:
        working.set()
        try:
            return perform(*arguments)
        finally:
            working.clear()

    monkeypatch.setattr(Artifact, "_open", lambda self, name: Counting(self.directory.name, plain(self, name)))
    monkeypatch.setattr(stages, "perform", performed)
    yield counted


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_every_tensor_of_a_block_is_read_once_in_a_stage(
    chain: list[dict[str, Any]], small_model: Path, small_text: Path, tmp_path: Path, reads: Counter[tuple[str, str]], no_pages: None
) -> None:
    save_speaking("llama", tmp_path / "model", small_model, num_hidden_layers=3)
    for stage in chain:
        address = next(iter(stage))
        reads.clear()
        runner.run(chosen(tmp_path, tmp_path / "model", small_text, chain), tmp_path / "run", until_stage=address, device="cpu")
        of_blocks = {key: count for key, count in reads.items() if ".layers." in key[1]}
        assert set(of_blocks.values()) == {1}, [key for key, count in of_blocks.items() if count > 1]
        parents = {place for place, _ in of_blocks if not place.endswith(".partial")}
        assert len(parents) == (1 if address == next(iter(chain[0])) else 2), "the baseline's blocks serve as targets"


def test_the_next_block_is_read_while_one_is_computed_on(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StreamedModel(runner.last_artifact(finished, "baseline"), CPU)
    read: list[str] = []
    plain = Artifact.tensors
    monkeypatch.setattr(Artifact, "tensors", lambda self, prefix: read.append(prefix) or plain(self, prefix))
    for index in model.walk():
        if index + 1 < model.structure.blocks:
            model.reader._read[model.prefix(index + 1)].result(timeout=30)
        expected = [model.prefix(i) for i in range(min(index + 2, model.structure.blocks))]
        assert read == expected, "each once, one ahead, and none behind the last"
    assert not model.reader._read and all(p.is_meta for p in model.layers.parameters()), "nothing is held afterwards"


def test_a_block_that_is_kept_stays_until_it_is_dropped(finished: Path) -> None:
    artifact = runner.last_artifact(finished, "quantize")
    reader, prefix = BlockReader(artifact, keeps=True), "model.layers.1."
    kept = reader.block(prefix)
    assert reader.block(prefix) is kept
    names = [n for n in artifact.linears if n.startswith(prefix)]
    assert names and all(torch.equal(kept.stored(n).dense(), artifact.stored(n).dense()) for n in names)
    reader.drop(prefix)
    assert reader.block(prefix) is not kept


def test_what_goes_wrong_in_the_background_is_raised_where_it_is_asked_for(finished: Path, tmp_path: Path) -> None:
    def broken() -> None:
        raise InputError("torn")

    with pytest.raises(InputError, match="torn"):
        in_background(broken).result()


def test_a_linear_that_a_binder_replaces_holds_no_weight(finished: Path) -> None:
    """Also one that was never compressed: it trains as a dense record, and its plain twin waits without parameters until it comes home."""
    artifact = runner.last_artifact(finished, "baseline")
    model = StreamedModel(artifact, CPU)
    plain = dict(model.layers[0].named_modules())
    model.load_block(0, bind=InPlace(artifact, model.structure, CPU, torch.float32))
    assert isinstance(model.layers[0].mlp.down_proj, CompressedLinear)
    assert plain["mlp.down_proj"].weight.is_meta and plain["self_attn.q_proj"].weight.is_meta
    model.unload_block(0)
    assert model.layers[0].mlp.down_proj is plain["mlp.down_proj"]
    model.load_block(0)
    assert torch.equal(model.layers[0].mlp.down_proj.weight, artifact.tensor("model.layers.0.mlp.down_proj.weight").float())
