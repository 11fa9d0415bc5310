"""Somebody's quantized GGUF file: its codes come in bit for bit, every tensor in its own type, and train where they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.compress.ggml_grids import round_ggml
from bitmend.compress.weights import GgmlWeight
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.formats import read
from bitmend.pipelines.formats.ggml_blocks import pack
from bitmend.pipelines.models.source import resolve_model, source_of
from bitmend.pipelines.planning.plan import predict
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.opening import last_artifact
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

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



EXPERTS = {"attn_v": "q8_0", "ffn_gate_exps": "q4_0", "ffn_up_exps": "q4_0", "ffn_down_exps": "q5_1"}


def write_experts(path: Path, vocabulary: dict[str, Any], types: dict[str, str], architecture: str = "qwen3moe") -> Path:
    """A tiny random mixture of experts as llama.cpp stores it: gate and up apart, all experts of a block in one tensor."""
    tokens = [token for token, _ in sorted(vocabulary["vocab"].items(), key=lambda item: item[1])]
    torch.manual_seed(0)
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "num_hidden_layers": 2}
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = CONFIG_MAPPING["qwen3_moe"](vocab_size=len(tokens), max_position_embeddings=128, initializer_range=0.1, **shape, **own)
    state, writer = AutoModelForCausalLM.from_config(config).state_dict(), GGUFWriter(path, architecture)

    def add(name: str, matrix: torch.Tensor) -> None:
        kind = next((kind for part, kind in types.items() if part in name), None)
        if kind is None:
            writer.add_tensor(name, matrix.contiguous().numpy())
        else:
            blocks = torch.stack([pack(round_ggml(part, kind)) for part in matrix]) if matrix.ndim == 3 else pack(round_ggml(matrix, kind))
            writer.add_tensor(name, blocks.numpy(), raw_dtype=GGMLQuantizationType[kind.upper()])

    for key, value in (
        ("context_length", 128), ("embedding_length", 64), ("block_count", 2), ("feed_forward_length", 96), ("attention.head_count", 4),
        ("attention.head_count_kv", 2), ("attention.key_length", 16), ("attention.value_length", 16), ("vocab_size", len(tokens)),
        ("expert_count", 4), ("expert_used_count", 2), ("expert_feed_forward_length", 32),
    ):  # fmt: skip
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, ours in (("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")):
        add(f"{name}.weight", state[f"{ours}.weight"])
    for index in range(2):
        prefix, fused = f"model.layers.{index}.", state[f"model.layers.{index}.mlp.experts.gate_up_proj"]
        for name, ours in (
            ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj"), ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"),
            ("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm"), ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"), ("ffn_gate_inp", "mlp.gate"),
        ):  # fmt: skip
            add(f"blk.{index}.{name}.weight", state[f"{prefix}{ours}.weight"])
        for name, stacked in (("gate", fused[:, :32]), ("up", fused[:, 32:]), ("down", state[f"{prefix}mlp.experts.down_proj"])):
            add(f"blk.{index}.ffn_{name}_exps.weight", stacked)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def vocabulary(small_model: Path) -> dict[str, Any]:
    return json.loads((small_model / "tokenizer.json").read_text())["model"]


def test_stacked_experts_keep_their_codes(vocabulary: dict[str, Any], small_text: Path, tmp_path: Path) -> None:
    file = write_experts(tmp_path / "moe.gguf", vocabulary, EXPERTS)
    recipe = chosen(tmp_path, file, small_text, [{"recover": SCALES}], **FEW)
    assert predict(recipe)["refusals"] == []
    runner.run(recipe, tmp_path / "run", device="cpu")
    before, after = last_artifact(tmp_path / "run", "baseline"), last_artifact(tmp_path / "run", "recover")
    experts = [name for name in before.linears if ".experts." in name]
    assert len(experts) == 2 * 4 * 2 and len(before.linears) == 16 + 2
    stacked = {t.name: torch.from_numpy(t.data.copy()) for t in GGUFReader(file).tensors}
    values = {t.name: torch.from_numpy(dequantize(t.data, t.tensor_type)) for t in GGUFReader(file).tensors if "_exps" in t.name}
    theirs = {f"model.layers.{i}.mlp.experts.down_proj": values[f"blk.{i}.ffn_down_exps.weight"] for i in range(2)}
    theirs |= {
        f"model.layers.{i}.mlp.experts.gate_up_proj": torch.cat([values[f"blk.{i}.ffn_{part}_exps.weight"] for part in ("gate", "up")], 1)
        for i in range(2)
    }
    moved = 0
    for name in experts:
        module, _, number = name.rpartition(".")
        old, new = before.stored(name).base, after.stored(name).base
        assert isinstance(old, GgmlWeight) and isinstance(new, GgmlWeight) and torch.equal(old.codes, new.codes)
        assert torch.equal(old.dense(), theirs[module][int(number)]) and old.type == ("q5_1" if "down" in name else "q4_0")
        moved += int((old.super_scales != new.super_scales).sum())
    third = pack(before.stored("model.layers.1.mlp.experts.gate_up_proj.3").base)
    assert torch.equal(third, torch.cat([stacked[f"blk.1.ffn_{part}_exps.weight"][3] for part in ("gate", "up")])) and moved


def test_experts_whose_parts_are_of_two_types_come_densely(vocabulary: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_experts(tmp_path / "moe.gguf", vocabulary, EXPERTS | {"ffn_up_exps": "q5_0"})
    checkpoint = read(resolve_model(str(file), codes=True))
    assert sum("down_proj" in name for name in checkpoint.linears) == 8 and not any("gate_up" in name for name in checkpoint.linears)
    assert checkpoint.tensors["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 64, 64)
    messages = [r.getMessage() for r in caplog.records if "two types" in r.getMessage()]
    assert len(messages) == 2 and "blk.0.ffn_gate_exps.weight with blk.0.ffn_up_exps.weight" in messages[0]


def test_experts_that_transformers_would_leave_out_are_refused(vocabulary: dict[str, Any], tmp_path: Path) -> None:
    """As Mixtral's files are."""
    file = write_experts(tmp_path / "mixtral.gguf", vocabulary, EXPERTS, architecture="llama")
    with pytest.raises(InputError, match=r"mixtral\.gguf: a mixture of 4 experts under the architecture 'llama' \(Mixtral\), .*; give the Hugging Face checkpoint"):
        resolve_model(str(file), codes=True)


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
