"""Somebody's quantized GGUF file: its codes come in bit for bit, every tensor in its own type, and train where they are."""

import json
from pathlib import Path

import pytest
import torch
from bitmend.compress.weights import GgmlWeight
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.formats import read
from bitmend.pipelines.formats.ggml_blocks import pack
from bitmend.pipelines.models.source import resolve_model, source_of
from bitmend.pipelines.planning.plan import predict
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.opening import last_artifact
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from ..demo.test_demo import write_gguf
from ..runs import chosen

pytestmark = pytest.mark.usefixtures("no_pages")

TYPES = {"token_embd": "q6_k", "attn_q": "q4_k", "attn_k": "q4_1", "attn_v": "q8_0", "ffn_gate": "q5_k", "ffn_down": "q3_k"}
FOUND = {"embed_tokens": "q8_0", "q_proj": "q5_0", "k_proj": "q4_1", "v_proj": "q8_0", "gate_proj": "q5_1", "down_proj": "q3_k"}
SCALES = {"method": "scales", "scales": "auto", "norms": False, "steps": 4, "batch_size": 2, "seq_len": 64, "eval_every": 4, "learning_rate": 0.004}
FEW = {"calibration": {"samples": 2, "seq_len": 64}, "evaluation": {"seq_len": 64, "windows": 4}}


@pytest.fixture(scope="module")
def mixed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.Q3_K_M.gguf", small_model, types=TYPES)


def test_codes_come_in_bit_for_bit_and_every_tensor_in_its_type(mixed: Path) -> None:
    directory = resolve_model(str(mixed), codes=True)
    checkpoint, blocks = read(directory), {t.name: torch.from_numpy(t.data.copy()) for t in GGUFReader(mixed).tensors}
    types = {name: record.base.type for name, record in checkpoint.linears.items() if isinstance(record.base, GgmlWeight)}
    assert {name.rpartition(".")[2]: kind for name, kind in types.items()} == FOUND and len(types) == 4 * 5 + 1
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        assert torch.equal(pack(checkpoint.linears[f"model.layers.2.{ours}"].base), blocks[f"blk.2.{theirs}.weight"])
    query, rows = pack(checkpoint.linears["model.layers.1.self_attn.q_proj"].base), blocks["blk.1.attn_q.weight"]
    assert not torch.equal(query, rows) and torch.equal(query.view(4, 2, 16, -1).transpose(1, 2).reshape(rows.shape), rows)
    assert "model.layers.0.mlp.up_proj.weight" in checkpoint.tensors and resolve_model(str(mixed), codes=True) == directory


def test_the_model_is_the_one_that_transformers_reads(mixed: Path, small_text: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(mixed.parent, gguf_file=mixed.name, dtype=torch.float32).eval()
    recipe = chosen(tmp_path, mixed, small_text, [{"fuse": {"backend": "reference"}}], **FEW)
    runner.run(recipe, tmp_path / "run", device="cpu")
    artifact = last_artifact(tmp_path / "run", "baseline")
    state = theirs.state_dict()
    assert all(torch.equal(artifact.stored(name).dense(), state[f"{name}.weight"]) for name in artifact.linears)
    assert predict(recipe)["stages"][0]["bits_per_weight"] == pytest.approx(
        sum(artifact.stored(n).stored_bits() for n in artifact.linears) / sum(artifact.stored(n).base.codes_OI().numel() for n in artifact.linears),
        abs=1e-3,
    )


def test_a_strangers_file_recovers_under_a_dense_teacher(mixed: Path, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    recipe = chosen(tmp_path, mixed, small_text, [{"recover": SCALES}], **FEW, teacher=str(small_model))
    assert predict(recipe)["refusals"] == []
    runner.run(recipe, tmp_path / "run", device="cpu")
    before, after = last_artifact(tmp_path / "run", "baseline"), last_artifact(tmp_path / "run", "recover")
    moved = 0
    for name in before.linears:
        old, new = before.stored(name).base, after.stored(name).base
        assert isinstance(old, GgmlWeight) and isinstance(new, GgmlWeight) and old.type == new.type
        assert torch.equal(old.codes, new.codes) and new.super_scales.dtype == torch.float16
        assert (old.small_codes is None) == (new.small_codes is None)
        assert old.small_codes is None or torch.equal(old.small_codes, new.small_codes)
        moved += int((old.super_scales != new.super_scales).sum())
    assert moved
    stages = {stage.stage: stage for stage in runner.record(tmp_path / "run").stages}
    assert stages["recover"].perplexity < stages["baseline"].perplexity



def test_blocks_that_are_not_there_are_refused(mixed: Path, tmp_path: Path) -> None:
    for file in resolve_model(str(mixed), codes=True).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    for types, message in (({"lm_head": "q4_k"}, "lm_head.blocks holds nothing"), ({"model.embed_tokens": "iq4_nl"}, "'iq4_nl'; read are q4_0")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "ggml", "types": types}}))
        with pytest.raises(InputError, match=message):
            read(tmp_path)


def test_where_a_stage_makes_codes_of_its_own_it_comes_densely_and_is_its_own_teacher(mixed: Path, small_text: Path, tmp_path: Path) -> None:
    for number, stages in enumerate(([{"quantize": {"method": "rtn"}}, {"recover": SCALES}], [{"recover": SCALES}])):
        (tmp_path / str(number)).mkdir()
        recipe = chosen(tmp_path / str(number), mixed, small_text, stages, **FEW)
        config = json.loads((source_of(recipe) / "config.json").read_text())
        assert ("quantization_config" in config) == (number == 1)
    assert resolve_model(str(mixed)) != source_of(recipe), "a teacher, and what is evaluated alone, is dense"
