"""Fisher information against autograd, sequence by sequence."""

from pathlib import Path

import pytest
import torch
from bitmend.pipelines import runner
from bitmend.pipelines.artifact import Artifact
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.inputs import Inputs
from bitmend.pipelines.models import inspect
from bitmend.pipelines.stages.baseline import build_baseline, fingerprint
from bitmend.pipelines.stages.context import Context
from bitmend.pipelines.stages.fisher import fisher_diagonal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .families import save_speaking
from .runs import chosen

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
    full_site = inspect(AutoModelForCausalLM.from_pretrained(tmp_path / "source")).sites[0]
    found = fisher_diagonal(given, frozenset({full_site.name}))
    sums = direct(tmp_path / "source", given.inputs.calibration())
    sites = inspect(AutoModelForCausalLM.from_pretrained(tmp_path / "source")).sites
    assert set(found) == {site.name for site in sites}
    for site in sites:
        expected = site.read(sums[f"{site.module}.{site.parameter}"])
        assert expected.shape == site.shape
        torch.testing.assert_close(found[site.name].row_mean_O, expected.mean(1), rtol=1e-3, atol=1e-12)
        torch.testing.assert_close(found[site.name].column_mean_I, expected.mean(0), rtol=1e-3, atol=1e-12)
    whole = found[full_site.name].full_OI
    assert whole is not None
    torch.testing.assert_close(whole, full_site.read(sums[f"{full_site.module}.{full_site.parameter}"]), rtol=1e-3, atol=1e-12)


def test_it_is_computed_once(tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = context(tmp_path, small_model, small_text)
    first = fisher_diagonal(given)
    monkeypatch.setattr("bitmend.pipelines.stages.fisher._collect", lambda *a: pytest.fail("computed again"))
    again = fisher_diagonal(given)
    assert set(first) == set(again)
    for name, found in first.items():
        assert torch.equal(found.row_mean_O, again[name].row_mean_O) and torch.equal(found.column_mean_I, again[name].column_mean_I)


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
