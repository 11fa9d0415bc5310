"""Fisher information against autograd, sequence by sequence."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.models import hidden
from bitmend.pipelines.models.hidden import Room
from bitmend.pipelines.models.structure import inspect
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages import fisher
from bitmend.pipelines.stages.baseline import build_baseline, fingerprint
from bitmend.pipelines.stages.context import Context
from bitmend.pipelines.stages.fisher import fisher_diagonal
from bitmend.pipelines.stages.inputs import Inputs
from bitmend.pipelines.store.artifact import Artifact
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ..families import save_speaking
from ..runs import chosen

CPU = torch.device("cpu")


def context(place: Path, source: Path, text: Path, stop: bool = False) -> Context:
    recipe = chosen(place, source, text, [{"quantize": {"method": "rtn"}}], calibration={"samples": 3, "seq_len": 32})
    key = fingerprint(source)
    baseline: Artifact = build_baseline(
        source, place / "b.partial", place / "b", {"key": key, "parent": None, "stage": {"name": "baseline", "method": None}}
    )
    inputs = Inputs(recipe, source)
    return Context(baseline, baseline, place / "metrics", place / "states", place, CPU, torch.float32, 0, inputs, lambda: stop)


def direct(source: Path, ids_NT: torch.Tensor) -> dict[str, torch.Tensor]:
    """Σ over sequences of squared gradients of every parameter."""
    model = AutoModelForCausalLM.from_pretrained(source, experts_implementation="eager")
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for ids in ids_NT:
        model.zero_grad()
        model(ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss.backward()
        for n, p in model.named_parameters():
            if p.grad is not None:
                sums[n] += p.grad.square()
    return sums


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_squared_gradients(family: str, tmp_path: Path, small_model: Path, small_text: Path) -> None:
    save_speaking(family, tmp_path / "source", small_model)
    given = context(tmp_path, tmp_path / "source", small_text)
    actual = fisher_diagonal(given)
    sums = direct(tmp_path / "source", given.inputs.calibration())
    sites = inspect(AutoModelForCausalLM.from_pretrained(tmp_path / "source")).sites
    assert set(actual) == {site.name for site in sites}
    for site in sites:
        expected = site.read(sums[f"{site.module}.{site.parameter}"])
        assert expected.shape == site.shape
        torch.testing.assert_close(actual[site.name].row_mean_O, expected.mean(1), rtol=1e-3, atol=1e-12)
        torch.testing.assert_close(actual[site.name].column_mean_I, expected.mean(0), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_squares_at_the_embeddings_and_the_head(
    family: str, tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No token comes twice in a sequence, so that the gradient of a row of the table is that of one token: Gemma's table is multiplied when it is
    looked up, OPT's is narrower than the model."""
    save_speaking(family, tmp_path / "source", small_model, tie_word_embeddings=False)
    given, generator = context(tmp_path, tmp_path / "source", small_text), torch.Generator().manual_seed(0)
    ids_NT = torch.stack([2 + torch.randperm(1000, generator=generator)[:32] for _ in range(3)])
    monkeypatch.setattr(Inputs, "calibration", lambda self: ids_NT)
    actual = fisher.output_squares(given)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    outs: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: outs.append(out))
    table = direct(tmp_path / "source", ids_NT)[next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)]
    for ids in ids_NT:
        loss = model(ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss
        outs[-1].retain_grad()
        loss.backward()
    assert actual.looked_up_D is not None and actual.logits_V is not None
    torch.testing.assert_close(actual.looked_up_D.float(), table.sum(0), rtol=1e-3, atol=1e-10)
    squares_V = sum((out.grad.square().sum((0, 1)) for out in outs), torch.zeros(1024))  # type: ignore[union-attr]
    torch.testing.assert_close(actual.logits_V.float(), squares_V, rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sums_do_not_depend_on_how_much_fits(
    family: str, tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sequences at once; one at a time, its states in files; and no more than one block is ever loaded."""
    save_speaking(family, tmp_path / "source", small_model)
    given = context(tmp_path, tmp_path / "source", small_text)
    loaded: list[int] = []

    class Watched(fisher.StreamedModel):
        def run_block(self, index: int, hidden_NTD: torch.Tensor) -> torch.Tensor:
            loaded.append(sum(not any(p.is_meta for p in block.parameters()) for block in self.layers))
            return super().run_block(index, hidden_NTD)

    monkeypatch.setattr(fisher, "StreamedModel", Watched)
    at_once, outside = fisher._collect(given)
    calls = len(loaded)
    monkeypatch.setattr(hidden, "free_bytes", lambda device: 0)
    assert fisher.sequences_at_once(Watched(given.baseline, CPU), given.inputs.calibration(), Room.measured(CPU, tmp_path)) == 1
    alone, also_outside = fisher._collect(given)
    assert set(loaded) == {1} and len(loaded) == 2 * calls
    for name, (row_O, column_I) in at_once.items():
        assert torch.equal(row_O, alone[name][0]) and torch.equal(column_I, alone[name][1])
    for actual, again in zip(vars(outside).values(), vars(also_outside).values(), strict=True):
        assert actual.any() and torch.equal(actual, again)


def test_a_long_text_passes_the_head_in_spans(tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = context(tmp_path, small_model, small_text)
    whole, logits_V = fisher._collect(given)[0], fisher._collect(given)[1].logits_V
    monkeypatch.setattr(fisher, "LOGITS_AT_ONCE", 7)
    spans, outside = fisher._collect(given)
    torch.testing.assert_close(outside.logits_V, logits_V, rtol=1e-4, atol=1e-14)
    for name, (row_O, column_I) in spans.items():
        torch.testing.assert_close(row_O, whole[name][0], rtol=1e-3, atol=1e-14)
        torch.testing.assert_close(column_I, whole[name][1], rtol=1e-3, atol=1e-14)


def test_in_bfloat16_it_is_about_the_same(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    given = context(tmp_path, small_model, small_text)
    exact, rough = fisher_diagonal(given), fisher_diagonal(replace(given, dtype=torch.bfloat16))
    assert len(list((tmp_path / "metrics").glob("fisher-*"))) == 2, "another dtype has numbers of its own"
    for name, actual in exact.items():
        ratio = float(rough[name].row_mean_O.sum() / actual.row_mean_O.sum())
        assert 0.9 < ratio < 1.1, name
    assert fisher.dtype_of_gradients(replace(given, dtype=torch.float16)) == torch.float32


def test_it_is_computed_once(tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = context(tmp_path, small_model, small_text)
    first = fisher_diagonal(given)
    monkeypatch.setattr("bitmend.pipelines.stages.fisher._collect", lambda *a: pytest.fail("computed again"))
    again = fisher_diagonal(given)
    assert set(first) == set(again)
    for name, actual in first.items():
        assert torch.equal(actual.row_mean_O, again[name].row_mean_O) and torch.equal(actual.column_mean_I, again[name].column_mean_I)


def test_it_stops_when_asked(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fisher_diagonal(context(tmp_path, small_model, small_text, stop=True))
    assert not list(tmp_path.glob("metrics/*"))


def test_a_loss_that_depends_on_nothing_is_refused(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    save_speaking("llama", tmp_path / "source", small_model, tie_word_embeddings=False)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["lm_head.weight"].zero_()
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="Fisher information is 0 everywhere"):
        fisher_diagonal(context(tmp_path, tmp_path / "source", small_text))


def test_lq_lora_goes_by_it(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    chain = [
        {"quantize": {"method": "nf4", "block_size": 32}},
        {"decompose": {"method": "lq_lora", "rank": 4, "iterations": 2}},
    ]
    made = runner.run(chosen(tmp_path, small_model, small_text, chain), tmp_path / "run")
    assert made.stages[2].kl_to_baseline is not None and made.stages[1].kl_to_baseline is not None
    assert made.stages[2].kl_to_baseline < made.stages[1].kl_to_baseline
    assert len(list(tmp_path.glob("run/stages/00-baseline*.metrics/fisher-*.safetensors"))) == 1
