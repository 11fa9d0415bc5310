"""Fused experts train like any other linear, whatever the method; what cannot reach them says so or refuses before any work."""

import re
from typing import Any

import pytest
import torch
from bitmend.recover.compressed_model import compressed_linears, install
from bitmend.recover.experts import ExpertMatrices, is_expert
from bitmend.recover.fits import left_alone, misfit
from bitmend.recover.losses import Objective
from bitmend.recover.recovery_methods import RECOVER, attach, config_of
from bitmend.recover.site import Gradients
from bitmend.recover.student import student_of
from bitmend.recover.train import batch_loss
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from .conftest import VOCABULARY, batch, block_linears, expert_matrices, is_transposed, records

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.2, "head_dim": 16,
}  # fmt: skip


def mixture(family: str = "mixtral") -> Any:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SMALL)
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_installed_experts_compute_what_their_records_say(family):
    """Both layouts: [E, O, I] read by `linear`, and [E, I, O] read by `@`."""
    model, twin, ids = mixture(family), mixture(family), batch(0).ids
    stored = records(model, "3-bit")
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name in {n.rpartition(".")[0] for n in stored if is_expert(twin, n)}:
                dense = torch.stack([stored[f"{name}.{e}"].dense() for e in range(4)])
                p.copy_(dense.mT if is_transposed(twin, name) else dense)
        for name in block_linears(twin):
            if name in stored:
                twin.get_submodule(name).weight.copy_(stored[name].dense())
    experts = [name for name in stored if is_expert(model, name)]
    install(model, stored)
    assert len(experts) == 2 * 2 * 4 and all(is_expert(model, name) for name in experts)
    assert set(compressed_linears(model)) == set(stored)
    torch.testing.assert_close(model(ids).logits, twin(ids).logits, atol=1e-4, rtol=1e-4)


def test_some_experts_of_a_parameter_are_refused():
    model = mixture()
    some = {name: record for name, record in records(model, "3-bit").items() if not name.endswith(".3")}
    with pytest.raises(ValueError, match=r"gate_up_proj: 3 of its 4 experts have a record"):
        install(model, some)


def test_nothing_but_a_product_can_be_done_with_an_expert():
    stack = ExpertMatrices([nn.Linear(4, 4, bias=False) for _ in range(2)])
    x = torch.randn(3, 4)
    assert torch.equal(nn.functional.linear(x, stack[torch.tensor(1)]), stack.get_submodule("1")(x))
    with pytest.raises(NotImplementedError, match=r"more with a matrix than multiply tokens by it \(add\)"):
        torch.add(x, stack[0])


KIND = {"perp": "pruned", "full": "pruned", "qa_lora": "3-bit"}
REACHES = [n for n in RECOVER if not n.endswith("_tuning") and not n.endswith("adapter") and n not in ("bitfit", "reconstruct")]
SETTINGS: dict[str, dict[str, Any]] = {
    "perp": {"lora": "mask_lora"}, "diff_pruning": {"share": 0.05}, "pafi": {"share": 0.05}, "fish_mask": {"share": 0.05, "quota": "matrix"},
}  # fmt: skip
OF_EXPERT = ("lq_lora", "loftq")


@pytest.mark.parametrize("method", REACHES)
def test_every_method_that_changes_linears_trains_experts(method):
    model = mixture()
    kind = "lq" if method in OF_EXPERT else KIND.get(method, "3-bit")
    install(model, records(model, kind))
    config = SETTINGS.get(method, {}) | ({"rank": 2} if hasattr(config_of(method, {}), "rank") else {})
    attached = attach(method, model, config, gradients=_gradients(model))
    of_experts = {n for n in attached.trainables if ".experts." in n}
    touched = {n for n in compressed_linears(model) if is_expert(model, n) and any(t.startswith(n) for t in of_experts)}
    assert len(touched) == 16, sorted(attached.trainables)
    batch_loss(student_of(model), batch(0), None, Objective("cross_entropy")).backward()
    moved = [n for n in of_experts if (g := attached.trainables[n].parameter.grad) is not None and bool(g.any())]
    assert len(moved) >= 8, "experts that tokens reach have gradients"


def _gradients(model: Any) -> Any:
    student = student_of(model)
    return Gradients(batch, lambda b: batch_loss(student, b, None, Objective("cross_entropy")))


def shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    matrices = {name: module.weight for name, module in block_linears(model).items()} | expert_matrices(model)
    return {name: (len(matrix), len(matrix[0])) for name, matrix in matrices.items()}


@pytest.mark.parametrize(
    ("method", "config", "words"),
    [
        ("bitfit", {"targets": "down"}, "a choice of fused experts alone leaves no trainable parameter"),
        ("parallel_adapter", {}, r"leave no attention or MLP sublayer .* \(fused experts have no such linears\)"),
    ],
)
def test_what_could_train_nothing_is_refused_from_names_alone(method, config, words):
    model = mixture()
    settings = config_of(method, config)
    assert (reason := misfit(settings, model, shapes(model))) is not None and re.search(words, reason)
    install(model, records(model, "3-bit"))
    with pytest.raises(ValueError, match=words):
        attach(method, model, config)


@pytest.mark.parametrize(
    ("method", "config", "words"),
    [
        ("bitfit", {}, ["left alone: the biases of model.layers.0.mlp.experts.gate_up_proj.0 and 15 more expert matrices"]),
        ("lora", {"biases": True, "targets": "down"}, ["left alone: the biases of model.layers.0.mlp.experts.down_proj.0 and 7 more"]),
        ("serial_adapter", {}, ["left alone: model.layers.0.mlp.experts.gate_up_proj.0 and 15 more expert matrices (no bottleneck"]),
        ("scales", {}, []),
        ("bitfit", {"targets": "q"}, []),
    ],
)
def test_what_is_left_alone_is_named(method, config, words):
    model = mixture()
    settings = config_of(method, config)
    actual = left_alone(settings, model, shapes(model))
    assert len(actual) == len(words) and all(line.startswith(start) for line, start in zip(actual, words, strict=True))
    install(model, records(model, "3-bit"))
    attached = attach(method, model, config)
    biases = {n for n in attached.trainables if n.endswith(".bias") and ".experts." in n}
    assert not biases, "as it says"
