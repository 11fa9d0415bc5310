import pytest
import torch
from bitmend.recover.compressed_model import compressed_linears
from bitmend.recover.criteria import choose, fisher_diagonal, saliency, smallest_magnitude
from bitmend.recover.losses import Objective
from bitmend.recover.recovery_methods import attach, config_of, refusal
from bitmend.recover.selection import decoder_blocks, norms, roles, where
from bitmend.recover.site import Gradients, gain
from bitmend.recover.student import Batch, student_of
from bitmend.recover.train import batch_loss
from torch import nn
from torch.testing import assert_close
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from .conftest import batch, compressed, gpt2, llama


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj", ("q",)),
        ("transformer.h.3.attn.c_attn", ("q", "k", "v")),
        ("transformer.h.3.attn.c_proj", ("o",)),
        ("transformer.h.3.mlp.c_proj", ("down",)),
        ("gpt_neox.layers.1.attention.dense", ("o",)),
        ("gpt_neox.layers.1.mlp.dense_4h_to_h", ("down",)),
        ("model.layers.0.mlp.gate_up_proj", ("gate", "up")),
        ("model.decoder.layers.0.fc1", ("up",)),
        ("model.decoder.layers.0.self_attn.out_proj", ("o",)),
        ("something.else", ()),
    ],
)
def test_roles(name, expected):
    assert roles(name) == expected


def test_experts_in_a_list_are_no_decoder():
    block = [nn.Sequential(nn.Linear(2, 2), nn.ModuleList(nn.Linear(2, 2) for _ in range(9))) for _ in range(3)]
    model = nn.ModuleDict({"layers": nn.ModuleList(block)})
    assert decoder_blocks(model)[0] == "layers"


def test_depth_and_targets():
    model = llama()
    assert decoder_blocks(model)[0] == "model.layers"
    assert where(model, layers="first:1").blocks == {0} and where(model, layers="last:1").blocks == {1}
    assert where(model, layers=(1,)).blocks == where(model, layers="1").blocks == {1}
    place = where(model, "q,down", "last:1")
    assert place.linear("model.layers.1.self_attn.q_proj") and not place.linear("model.layers.0.self_attn.q_proj")
    assert not place.linear("model.layers.1.self_attn.k_proj") and place.linear("model.layers.1.mlp.down_proj")
    assert where(model, r"mlp\.").linear("model.layers.1.mlp.up_proj") and not where(model, r"mlp\.").linear(
        "model.layers.1.self_attn.q_proj"
    )
    assert where(gpt2(), "k").linear("transformer.h.0.attn.c_attn")
    assert "model.norm" in norms(model, where(model)) and "model.norm" not in norms(model, where(model, layers="last:1"))
    assert len(norms(model, where(model))) == 5


@pytest.mark.parametrize(
    "settings", [{"layers": "first:3"}, {"layers": "upper"}, {"layers": (7,)}, {"targets": "("}, {"targets": "nothing_like_this"}]
)
def test_a_choice_that_leaves_nothing_is_refused(settings):
    with pytest.raises(ValueError, match=r"layers|targets|block"):
        attach("lora", compressed("3-bit"), settings)


@pytest.mark.parametrize(
    ("name", "settings", "kind", "words"),
    [
        ("full", {}, "3-bit", "qat"),
        ("scales", {}, "pruned", "quantize first"),
        ("scales", {"zeros": True}, "nf4", "no zero points"),
        ("qa_lora", {}, "2:4+4-bit", "masked weights"),
        ("qa_lora", {}, "dense", "uniform grid"),
        ("perp", {"lora": "mask_lora"}, "3-bit", "quantized base"),
        ("loftq", {}, "3-bit", "decompose stage"),
        ("qlora", {}, "pruned", "choose lora"),
        ("lota", {}, "nf4", "NormalFloat"),
        ("lora", {"rank": 33}, "3-bit", "rank 33 does not fit model.layers.0.self_attn.q_proj, a layer of 32"),
        ("serial_adapter", {"bottleneck": 33}, "3-bit", "bottleneck 33"),
        ("pafi", {"share": 0.0}, "dense", "share 0.0"),
        ("fish_mask", {}, "dense", "pass `gradients`"),
        ("prefix_tuning", {"gradient_checkpointing": True}, "dense", "gradient_checkpointing=false"),
        ("bitfit", {"create": False}, "dense", "no trainable parameter"),
    ],
)
def test_refusals_name_the_reason(name, settings, kind, words):
    with pytest.raises(ValueError, match=words):
        attach(name, compressed(kind), settings)


def test_a_norm_is_trained_in_units_of_its_gain():
    """One rate for a norm whose weights are hundredths and for one that stores gain − 1."""
    model = compressed("dense")
    small, large = model.model.layers[0].input_layernorm, model.model.layers[1].input_layernorm
    with torch.no_grad():
        small.weight.mul_(0.03)
    rates = {name: t.rate for name, t in attach("perp", model, {"biases": False}).trainables.items()}
    ratio = rates["model.layers.0.input_layernorm.weight"] / rates["model.layers.1.input_layernorm.weight"]
    assert ratio == pytest.approx(0.03, rel=1e-3) and gain(large) == pytest.approx(1, abs=0.01)
    around_one = GemmaRMSNorm(32)
    torch.nn.init.constant_(around_one.weight, 1.0)
    assert gain(around_one) == pytest.approx(2, abs=0.01)
    silent = torch.nn.LayerNorm(32)
    torch.nn.init.zeros_(silent.weight)
    assert gain(silent) == 1.0


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="nearest is 'scales'"):
        config_of("scale", {})
    with pytest.raises(ValueError, match=r"no setting 'rnak' .nearest is 'rank'"):
        config_of("lora", {"rnak": 3})
    config = config_of("lora", {"rank": 3, "steps": 5})
    assert (config.steps, config.rank) == (5, 3)
    assert refusal("lora", [frozenset({"dense"})], {}) is None


def test_choose_takes_kept_weights_only_and_the_share_that_was_asked():
    generator = torch.Generator().manual_seed(1)
    scores = {"a": torch.rand(8, 16, generator=generator), "b": torch.rand(8, 16, generator=generator) * 0.1}
    kept = {"a": torch.rand(8, 16, generator=generator) > 0.5, "b": None}
    everywhere = choose(scores, kept, 0.1)
    assert sum(map(len, everywhere.values())) == round(0.1 * 256) and set(everywhere) == {"a"}
    assert bool(kept["a"].view(-1)[everywhere["a"]].all())
    best = scores["a"].where(kept["a"], -1).view(-1).topk(26).indices.sort().values
    assert torch.equal(everywhere["a"], best)
    assert {n: len(i) for n, i in choose(scores, kept, 0.1, "matrix").items()} == {"a": 13, "b": 13}
    rows = choose(scores, {"a": None, "b": None}, 0.125, by="channel")["a"]
    assert len(rows) == 32 and len((rows // 16).unique()) == 2
    assert set(choose(scores, kept, 0.5, by="layer")) == {"a"}


def test_magnitude_and_saliency():
    w = torch.tensor([[0.1, -2.0]])
    assert smallest_magnitude(w)[0, 0] > smallest_magnitude(w)[0, 1]
    assert torch.equal(saliency(w, torch.tensor([[2.0, 3.0]])), 0.5 * torch.tensor([[2.0, 3.0]]) * w**2)


def _keep(seen):
    def hook(module, args, y):
        seen.append((args[0].detach(), y))

    return hook


@pytest.mark.parametrize("kind", ["3-bit", "everything"])
def test_fisher_is_the_mean_squared_gradient_per_sequence(kind):
    model = compressed(kind)
    student = student_of(model)
    gradients = Gradients(batch, lambda b: batch_loss(student, b, None, Objective("cross_entropy")))
    linears = compressed_linears(model)
    name = "model.layers.1.mlp.down_proj"
    actual = fisher_diagonal({name: linears[name]}, gradients, 3)[name]
    assert linears[name].reweight is None
    truth = torch.zeros_like(actual)
    linear = linears[name]
    rows = [row for i in (0, 1) for row in batch(i).ids.split(1)][:3]
    for ids in rows:
        seen = []
        hook = linear.register_forward_hook(_keep(seen))
        with torch.enable_grad():
            model.get_input_embeddings().weight.requires_grad_(True)
            loss = gradients.loss(Batch(ids))
        hook.remove()
        x, y = seen[0]
        g = torch.autograd.grad(loss, y)[0]
        truth += (g[0].T @ linear.base_input(x[0])).square() / 3
    assert_close(actual, truth, atol=1e-7, rtol=1e-3)


def test_pruned_ranks_are_the_smallest_singular_values_and_come_back():
    model = compressed("lq")
    attached = attach("lora", model, {"prune_ranks": 0.5})
    linears, ids = compressed_linears(model), batch(0).ids
    for i, linear in enumerate(linears.values()):
        assert linear.up is not None
        linear.up.data *= 1 + 3 * (i == 2)
    before, whole = model(ids).logits, {n: lin.up @ lin.down for n, lin in linears.items()}
    assert attached.prune is not None
    left = attached.prune(True)
    assert sum(left.values()) == 4 * len(linears) // 2 and max(left.values()) == left[list(linears)[2]] == 4
    values = torch.cat([torch.linalg.svdvals(w)[:4] for w in whole.values()]).sort(descending=True).values
    lost = sum(float((whole[n] - (lin.up @ lin.down if lin.up is not None else 0)).square().sum()) for n, lin in linears.items())
    assert lost == pytest.approx(float(values[sum(left.values()) :].square().sum()), rel=1e-3)
    for name, linear in linears.items():
        low_rank = linear.to_stored()[0].low_rank
        assert (0 if low_rank is None else low_rank.rank) == left[name]
    assert not torch.equal(model(ids).logits, before)
    attached.prune(False)
    assert torch.equal(model(ids).logits, before)


def test_pruned_units_are_those_that_do_least_and_come_back():
    model = compressed("3-bit")
    attached, ids = attach("serial_adapter", model, {"bottleneck": 8, "prune_units": 0.75}), batch(0).ids
    for name, t in attached.trainables.items():
        if name.endswith(".up"):
            t.parameter.data[:, 0] = 0.1 if name.startswith("model.layers.1") else 0.0
    before = model(ids).logits
    assert attached.prune is not None and attached.extra_modules is not None
    left = attached.prune(True)
    assert left == {n: (1 if "layers.1" in n else 0) for n in left} and len(left) == 4, "units that tie with the rest go as well"
    assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)
    assert attached.extra_modules().tensors["model.layers.0.mlp.up"].shape == (32, 0)
    attached.prune(False)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("quota", ["global", "matrix"])
def test_of_equal_scores_no_more_are_taken_than_asked_for_and_not_all_in_one_place(quota: str) -> None:
    """On a grid a third of all weights share the smallest magnitude."""
    draw = torch.Generator().manual_seed(0)
    weights = {name: torch.randint(-1, 2, (16, 32), generator=draw).float() for name in ("a", "b")}
    scores, kept = {name: -w.abs() for name, w in weights.items()}, {"a": None, "b": torch.rand(16, 32, generator=draw) < 0.5}
    actual = choose(scores, kept, 0.05, quota)  # type: ignore[arg-type]
    assert sum(len(index) for index in actual.values()) == round(0.05 * 1024) + (quota == "matrix")
    for name, index in actual.items():
        assert bool((weights[name].view(-1)[index] == 0).all()) and index.tolist() == sorted(set(index.tolist()))
        assert kept[name] is None or bool(kept[name].view(-1)[index].all())
        assert len({position // 32 for position in index.tolist()}) > 5, "rows"
    again = choose(scores, kept, 0.05, quota)  # type: ignore[arg-type]
    assert all(torch.equal(actual[name], again[name]) for name in actual)
