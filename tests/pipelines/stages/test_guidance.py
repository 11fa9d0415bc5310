"""Gradients of tokens against autograd over the whole model, and guided moments against sums written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.guided import row_groups, token_weights
from bitmend.pipelines.evaluation.perplexity import embedded
from bitmend.pipelines.models import hidden
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.collecting import Alongside, collect
from bitmend.pipelines.models.hidden import Room
from bitmend.pipelines.models.structure import inspect
from bitmend.pipelines.planning.plan import refusals
from bitmend.pipelines.ranks.exchange import ONE
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner
from bitmend.pipelines.stages import guidance
from bitmend.pipelines.stages.guidance import Guidance, token_squares
from bitmend.pipelines.stages.walked import share_of
from transformers import AutoModelForCausalLM

from ..families import save_speaking
from ..runs import chosen, hashes, write_recipe
from .test_fisher import CPU, context

pytestmark = pytest.mark.usefixtures("no_pages")

GUIDED: dict[str, Any] = {"method": "gptq", "bits": 3, "group_size": 16, "guided": 2}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_squared_gradients_of_tokens(family: str, tmp_path: Path, small_model: Path, small_text: Path) -> None:
    save_speaking(family, tmp_path / "source", small_model)
    given = context(tmp_path, tmp_path / "source", small_text)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    sites = [site for site in inspect(model).sites if site.block is not None]
    actual = token_squares(given, {site.name: 2 for site in sites})
    outs: dict[str, torch.Tensor] = {}
    for site in sites:
        model.get_submodule(site.module).register_forward_hook(lambda module, args, out, name=site.name: outs.update({name: out}))
    for n, ids in enumerate(given.inputs.calibration()):
        loss = model(ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss
        for out in outs.values():
            out.retain_grad()
        loss.backward()
        for site in sites:
            gradient = outs[site.name].grad
            assert gradient is not None
            expected = torch.stack([gradient[0][:, rows].square().mean(1) for rows in row_groups(site.shape[0], 2)], 1)
            torch.testing.assert_close(actual[site.name][n], expected, rtol=2e-3, atol=1e-13)


def test_moments_of_a_block(tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with all windows in one batch or one a batch."""
    given = context(tmp_path, small_model, small_text)
    ids, model = given.inputs.calibration(), StreamedModel(given.baseline, CPU)
    sites = model.structure.of_block(0)
    some = {site.name: 3 for site in sites if "k_proj" not in site.name}
    squares, model_inputs = token_squares(given, some), dict[str, torch.Tensor]()
    together = model.embed(ids)
    for at_once in (10**6, 1):
        monkeypatch.setattr("bitmend.pipelines.evaluation.perplexity.TOKENS_AT_ONCE", at_once)
        states, known = embedded(model, ids, Room(CPU)), Guidance.of(given, some)
        model.load_block(0)
        with torch.no_grad():
            with known.watching(model, sites, share_of(ids, ONE)) as watch:
                collect(model, 0, states, sites, frozenset({"norms"}), share_of(ids, ONE), Alongside(watch=watch))
            if at_once > 1:
                handles = [
                    model.model.get_submodule(s.module).register_forward_pre_hook(
                        lambda m, args, n=s.name: model_inputs.update({n: args[0].clone()})
                    )
                    for s in sites
                ]
                model.run_block(0, together)
                for handle in handles:
                    handle.remove()
        model.unload_block(0)
        assert set(known.moments) == set(some)
        for site in sites:
            if site.name in some:
                x_TI, weights_TK = model_inputs[site.name].flatten(0, 1).double(), token_weights(squares[site.name].flatten(0, 1)).double()
                for k, statistics in enumerate(known.moments[site.name]):
                    expected = (x_TI * weights_TK[:, k : k + 1]).T @ x_TI / len(x_TI)
                    torch.testing.assert_close(statistics.second_moment_II.double(), expected, rtol=1e-3, atol=1e-5)


def test_a_stage_reads_them_and_keeps_them(tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other codes than without, whatever fits into memory; gathered once for the stages that ask for the same; a matrix may have none."""
    made = {}
    for name, settings in {"plain": {"guided": 0}, "guided": {}, "some": {"overrides": {"mlp": {"guided": 0}}}}.items():
        (tmp_path / name).mkdir()
        recipe = chosen(
            tmp_path / name, small_model, small_text, [{"quantize": GUIDED | settings}], calibration={"samples": 4, "seq_len": 32}
        )
        runner.run(recipe, tmp_path / name / "run")
        made[name] = runner.last_artifact(tmp_path / name / "run")
    names = [f"model.layers.0.{leaf}" for leaf in ("self_attn.v_proj", "mlp.up_proj", "self_attn.o_proj")]
    codes = {n: [artifact.stored(name).dense() for name in names] for n, artifact in made.items()}
    assert not any(map(torch.equal, codes["plain"], codes["guided"]))
    assert torch.equal(codes["some"][0], codes["guided"][0]) and not torch.equal(codes["some"][1], codes["guided"][1])

    kept = list((tmp_path / "guided" / "run").rglob("guidance-*"))
    assert len(kept) == 1
    monkeypatch.setattr(guidance, "_collect", lambda *a: pytest.fail("gathered again"))
    before = hashes(tmp_path / "guided" / "run")
    recipe = chosen(tmp_path / "guided", small_model, small_text, [{"quantize": GUIDED}], calibration={"samples": 4, "seq_len": 32})
    runner.run(recipe, tmp_path / "guided" / "run", force="quantize")
    assert hashes(tmp_path / "guided" / "run") == before


def test_gradients_do_not_depend_on_how_much_fits(
    tmp_path: Path, small_model: Path, small_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = context(tmp_path, small_model, small_text)
    groups = {site.name: 2 for site in StreamedModel(given.baseline, CPU).structure.sites if site.block is not None}
    whole = guidance._collect(given, groups)
    monkeypatch.setattr(hidden, "free_bytes", lambda device: 0)
    for name, alone in guidance._collect(given, groups).items():
        assert torch.equal(alone, whole[name])


@pytest.mark.slow
def test_a_budgets_table_has_no_gradients_and_the_stage_has(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", [{"quantize": GUIDED}], calibration={"samples": 4, "seq_len": 32})
    recipe = resolve(str(path), options={"model": str(small_model), "data": str(small_text), "budget": "4.0bpw"})
    runner.run(recipe, tmp_path / "run")
    assert list((tmp_path / "run").rglob("guidance-*"))


@pytest.mark.parametrize(("family", "settings", "named"), [("mixtral", {}, "experts"), ("llama", {"include_head": True}, "lm_head")])
def test_what_not_every_token_reaches_is_solved_plainly(
    family: str, settings: dict[str, Any], named: str, tmp_path: Path, small_model: Path, small_text: Path
) -> None:
    """The head, and experts, as without guidance; their block's attention with it; the report says so."""
    save_speaking(family, tmp_path / "source", small_model)
    made, notes = {}, tuple[str, ...]()
    for name, guided in (("plain", 0), ("guided", 2)):
        (tmp_path / name).mkdir()
        stages = [{"quantize": GUIDED | settings | {"guided": guided}}]
        recipe = chosen(tmp_path / name, tmp_path / "source", small_text, stages, calibration={"samples": 4, "seq_len": 32})
        notes = runner.run(recipe, tmp_path / name / "run").stages[-1].notes
        made[name] = runner.last_artifact(tmp_path / name / "run")
    (note,) = [note for note in notes if note.startswith("guided: ")]
    assert named in note and "plain second moments" in note
    linears = sorted(made["plain"].linears)
    assert any(named in linear for linear in linears)
    attention = [n for n in linears if "layers.0.self_attn.v_proj" in n]
    assert attention and not any(torch.equal(made["plain"].stored(n).dense(), made["guided"].stored(n).dense()) for n in attention)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"guided": 64}, "rows cannot be 64 groups; set guided to"),
    ],
)
def test_refusals(family: str, settings: dict[str, Any], message: str, tmp_path: Path, small_model: Path, small_text: Path) -> None:
    save_speaking(family, tmp_path / "source", small_model)
    actual = refusals(chosen(tmp_path, tmp_path / "source", small_text, [{"quantize": GUIDED | settings}]), tmp_path / "source")
    assert any(message in line for line in actual), actual
