"""Records become modules on kernels: what shares an input is one product, embeddings and a tied head are one packed table, and what
comes out is still a transformers model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.kernels.linear import resident_bytes
from bitmend.kernels.table import FusedEmbedding
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.evaluation.speed import measure
from bitmend.pipelines.models.binding import KernelBinder, one_input
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.models.loading import whole_model
from bitmend.pipelines.planning.plan import predict
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.generate import generate
from bitmend.pipelines.run.opening import load
from transformers import AutoTokenizer, pipeline

from ..families import save_speaking
from ..runs import chosen, stage_directory

pytestmark = pytest.mark.usefixtures("no_pages")

CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"calibration": {"samples": 2, "seq_len": 32}, "evaluation": {"seq_len": 32, "windows": 2}}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Packed forms are kept however slow they are at this size."""
    monkeypatch.setattr("bitmend.kernels.cpu.PACKED_PATIENCE", 1e9)
    monkeypatch.setattr("bitmend.kernels.cpu.HALF_PATIENCE", 1e9)
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "choices"))
    monkeypatch.setattr("bitmend.kernels.choices._known", {})


def test_what_reads_one_input_stands_together() -> None:
    names = ["a.mlp.up_proj", "a.attn.v_proj", "a.attn.o_proj", "a.attn.q_proj", "a.mlp.gate_proj", "a.attn.k_proj", "b.attn.q_proj"]
    assert one_input(names) == [
        ["a.mlp.gate_proj", "a.mlp.up_proj"], ["a.attn.q_proj", "a.attn.k_proj", "a.attn.v_proj"], ["b.attn.q_proj"], ["a.attn.o_proj"],
    ]  # fmt: skip


def test_a_weight_that_the_models_code_reads_stays_dense(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    """Mamba multiplies with dt_proj's weight by itself, and asks the head's weight for its dtype; its inputs come transposed."""
    save_speaking("mamba", tmp_path / "source", small_model)
    stages: list[dict[str, Any]] = [{"quantize": {"method": "rtn", "bits": 4, "group_size": 16}}, {"fuse": {}}]
    made = runner.run(chosen(tmp_path, tmp_path / "source", small_text, stages, **SHORT), tmp_path / "run", device="cpu")
    assert made.stages[2].perplexity == pytest.approx(made.stages[1].perplexity, rel=1e-3)
    assert any("dt_proj: the model's code reads its weight, so it stays dense" in note for note in made.stages[2].notes)
    assert "".join(generate(tmp_path / "run", "The river", max_new_tokens=4, device="cpu"))


def test_inputs_that_no_linear_is_called_with_cannot_be_rounded(tmp_path: Path, small_model: Path, small_text: Path) -> None:
    save_speaking("mamba", tmp_path / "source", small_model)
    rtn: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 16, "activations": {"bits": 8, "group_size": 16}}
    recipe = chosen(tmp_path, tmp_path / "source", small_text, [{"quantize": rtn}], **SHORT)
    with pytest.raises(UsageError, match=r"activations: the model's code multiplies with \S+ by itself; leave such out, as in .*'dt_proj'"):
        runner.run(recipe, tmp_path / "run", device="cpu")
    assert any("multiplies with" in line for line in predict(recipe, device="cpu")["refusals"])
    ignored = chosen(
        tmp_path,
        tmp_path / "source",
        small_text,
        [{"quantize": rtn | {"ignore": ["dt_proj", "out_proj", "x_proj"]}}, {"fuse": {}}],
        **SHORT,
    )
    made = runner.run(ignored, tmp_path / "run", device="cpu")
    assert made.stages[2].perplexity == pytest.approx(made.stages[1].perplexity, rel=1e-2)


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    "family, tied, bits", [("llama", True, None), ("llama", True, 4), ("llama", False, 8), ("gemma3_text", True, 8), ("opt", True, None)]
)
def test_tables_stay_packed(family: str, tied: bool, bits: int | None, tmp_path: Path, small_model: Path, small_text: Path) -> None:
    """bits None: a table that no stage touched, kept in 16 bits."""
    save_speaking(family, tmp_path / "source", small_model, tie_word_embeddings=tied)
    embeddings = {} if bits is None else {"include_embeddings": True, "embedding_bits": bits}
    stages = [{"quantize": {"method": "rtn", "bits": 4, "group_size": 32, **embeddings}}]
    runner.run(chosen(tmp_path, tmp_path / "source", small_text, stages, **SHORT), tmp_path / "run", device="cpu")
    artifact = runner.last_artifact(tmp_path / "run")
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(1))
    model, dense = load(tmp_path / "run"), whole_model(artifact, CPU, torch.float32).model
    with torch.no_grad():
        got, expected = model(ids).logits, dense(ids).logits
    assert (got - expected).norm() / expected.norm() < 0.03
    assert isinstance(model.get_input_embeddings(), FusedEmbedding)
    width = {None: 2.0, 8: 1.0, 4: 0.5}[bits]
    entries = dense.get_input_embeddings().weight.numel()
    shared = resident_bytes(torch.nn.Sequential(model.get_input_embeddings(), model.get_output_embeddings()))
    head = model.get_output_embeddings().resident_bytes()
    if tied and family != "opt":
        assert head == model.get_input_embeddings().resident_bytes() and shared - head <= 4, "one table; a scale for it, perhaps"
        assert width <= head / entries < width + 0.3, "codes, and a scale and a zero for every 32 of them"
    model.tie_weights()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, got)


def test_the_reference_keeps_tables_dense(finished: Path) -> None:
    artifact = runner.last_artifact(finished)
    binder = KernelBinder("reference", CPU)
    model = StreamedModel(artifact, CPU, bind=binder).model
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding) and not model.get_input_embeddings().weight.is_meta
    assert model.get_output_embeddings().weight.is_meta is False


def test_an_embedding_that_computes_stays_dense_and_is_named(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Embedding, "forward", lambda self, ids: torch.nn.functional.embedding(ids, self.weight))
    plain = torch.nn.Embedding.forward

    class Other(torch.nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return plain(self, input).tanh()

    binder = KernelBinder("auto", CPU)
    assert not binder._looks_up("table", Other(3, 3)) and "Other does more than look up rows" in binder.reasons["table"]
    assert binder._looks_up("table", torch.nn.Embedding(3, 3))


def test_it_behaves_as_a_transformers_model(finished: Path, tmp_path: Path) -> None:
    model = load(finished)
    tokenizer = AutoTokenizer.from_pretrained(stage_directory(finished, "fuse"))
    assert model.device == CPU and model.dtype == torch.float32 and not model.training
    assert "backend=" in repr(model) and "of 3 that read one input" in repr(model)
    assert model.get_memory_footprint() == resident_bytes(model) > 0
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 6, "do_sample": False}
    (answer,) = write("The city of", **settings)
    ids = tokenizer("The city of", return_tensors="pt")
    assert answer["generated_text"] == tokenizer.decode(model.generate(**ids, **settings)[0], skip_special_tokens=True)
    assert len(write(["The city", "A river that is"], batch_size=2, **settings)) == 2
    with pytest.raises(InputError, match="bound to kernels and cannot be saved"):
        model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="load the model again"):
        model.to("meta")


def test_speed_is_measured_in_turn(finished: Path) -> None:
    model = load(finished)
    actual = measure({"one": model, "two": model}, torch.zeros(1, 4, dtype=torch.long), 4, 3)
    assert set(actual) == {"one", "two"}
    assert all(s.tokens_per_second > 0 and s.prompt_seconds > 0 and len(s.samples) == 3 for s in actual.values())
