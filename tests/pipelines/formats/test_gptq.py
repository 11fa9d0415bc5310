import json
from functools import partial

import pytest
import torch
from bitmend.compress.weights import DenseWeight, LowRank, StoredWeight, UniformWeight
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.formats import registry
from bitmend.pipelines.formats.checkpoint import Checkpoint
from bitmend.pipelines.formats.gptq_files import pack, read, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 96,
}


@st.composite
def uniform_weights(draw, low_zero=1):
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    rows, columns = 32 * draw(st.integers(1, 3)), 32 * draw(st.integers(1, 4))
    size = draw(st.sampled_from([s for s in (8, 16, 32, 64, columns) if columns % s == 0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    zeros = torch.randint(low_zero, 1 << bits, (rows, columns // size), generator=generator)
    scales = torch.rand(rows, columns // size, generator=generator).add(1e-3).half()
    index = torch.randperm(columns, generator=generator) // size if draw(st.booleans()) else None
    return UniformWeight.from_codes(codes, scales, None if draw(st.booleans()) else zeros, bits, size, index)


@settings(max_examples=40, deadline=None)
@given(uniform_weights())
@pytest.mark.parametrize("version", [1, 2])
def test_what_is_written_is_read_back_exactly(version, single, tmp_path_factory, base):
    directory = tmp_path_factory.mktemp("gptq") / "out"
    checkpoint = single(base)
    write(checkpoint, directory, version=version)
    back = read(directory)
    (record,) = back.linears.values()
    assert isinstance(record.base, UniformWeight)
    assert torch.equal(record.dense(), base.dense())
    assert record.base.bits == base.bits and record.base.symmetric == base.symmetric
    assert torch.equal(back.tensors["model.norm.weight"], torch.ones(base.in_features))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [5, 6])
@pytest.mark.parametrize("version", [1, 2])
def test_codes_of_5_and_6_bits_are_written_in_8(version, bits, symmetric, single, tmp_path):
    generator = torch.Generator().manual_seed(bits)
    codes, zeros = (torch.randint(0, 1 << bits, shape, generator=generator) for shape in ((32, 64), (32, 2)))
    base = UniformWeight.from_codes(codes, torch.rand(32, 2, generator=generator).half(), None if symmetric else zeros, bits, 32)
    notes = write(single(base), tmp_path / "out", version=version)
    (record,) = read(tmp_path / "out").linears.values()
    assert torch.equal(record.dense(), base.dense())
    assert isinstance(record.base, UniformWeight) and record.base.bits == 8 and record.base.symmetric == symmetric
    assert any("1 linears have codes of 5 or 6 bits" in note for note in notes)


@settings(max_examples=30, deadline=None)
@given(uniform_weights(low_zero=0))
def test_version_2_keeps_zeros_of_0(single, tmp_path_factory, base):
    directory = tmp_path_factory.mktemp("gptq") / "out"
    write(single(base), directory, version=2)
    (record,) = read(directory).linears.values()
    assert torch.equal(record.dense(), base.dense())


def test_layout_by_hand():
    codes = torch.arange(32 * 32).view(32, 32) % 16
    zeros = torch.full((32, 1), 5)
    base = UniformWeight.from_codes(codes, torch.full((32, 1), 0.5).half(), zeros, 4, 32)
    parts, lossy = pack("x", StoredWeight(base), 1)
    assert not lossy
    assert {name: (tuple(t.shape), t.dtype) for name, t in parts.items()} == {
        "qweight": ((4, 32), torch.int32),
        "qzeros": ((1, 4), torch.int32),
        "scales": ((1, 32), torch.float16),
        "g_idx": ((32,), torch.int32),
    }
    for i in range(32):
        word = int(parts["qweight"][i // 8, 3]) & 0xFFFFFFFF
        assert (word >> (4 * (i % 8))) & 15 == int(codes[3, i])
    assert int(parts["qzeros"][0, 0]) == 0x44444444


def test_masked_weights_ship_as_exact_zeros_and_the_note_says_what_is_lost(single, on_grid, tmp_path):
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    kept = torch.rand(64, 64, generator=torch.Generator().manual_seed(2)) > 0.5
    record = StoredWeight(on_grid(weight, act_order=True)).with_mask(kept)
    notes = write(single(record.base, mask=record.mask), tmp_path / "out")
    (back,) = read(tmp_path / "out").linears.values()
    assert torch.equal(back.dense(), record.dense()) and bool((back.dense()[~kept] == 0).all())
    assert any("masks themselves" in note for note in notes)


def test_mixed_bits_and_dense_linears_are_listed_in_dynamic(on_grid, tmp_path):
    def base(i):
        return on_grid(torch.randn(64, 64, generator=torch.Generator().manual_seed(i)), bits=(4, 4, 3)[i])

    linears = {f"model.layers.0.self_attn.{n}_proj": StoredWeight(base(i)) for i, n in enumerate("qkv")}
    linears["model.layers.0.self_attn.o_proj"] = StoredWeight(DenseWeight(torch.randn(64, 64)))
    notes = write(Checkpoint(CONFIG, linears, {}), tmp_path / "out")
    quantization = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert quantization["bits"] == 4
    assert quantization["dynamic"] == {
        r"+:^model\.layers\.0\.self_attn\.v_proj$": {"bits": 3, "group_size": 32},
        r"-:^model\.layers\.0\.self_attn\.o_proj$": {},
    }
    assert any("auto-gptq does not" in note for note in notes)
    back = read(tmp_path / "out")
    for name, record in back.linears.items():
        assert torch.equal(record.dense(), linears[name].dense())
    assert torch.equal(back.tensors["model.layers.0.self_attn.o_proj.weight"], linears["model.layers.0.self_attn.o_proj"].dense())


def test_experts_are_written_one_matrix_each(case, on_grid, tmp_path):
    made = case("mixtral", on_grid)
    write(made.checkpoint, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    fused = made.checkpoint.linears["model.layers.1.mlp.experts.gate_up_proj.2"]
    whole = pack("x", fused, 1)[0]
    for part in ("qweight", "qzeros", "scales"):
        gate, up = (tensors[f"model.layers.1.block_sparse_moe.experts.2.w{i}.{part}"] for i in (1, 3))
        assert torch.equal(torch.cat([gate, up], dim=1), whole[part])
    assert "model.layers.1.block_sparse_moe.gate.weight" in tensors
    back = read(tmp_path / "out")
    assert set(back.linears) == set(made.checkpoint.linears) and set(back.tensors) == set(made.checkpoint.tensors)
    for name, record in made.checkpoint.linears.items():
        assert torch.equal(back.linears[name].dense(), record.dense())


REFUSED = {
    "zero that wraps": (dict(zeros=0), {}, "gptq-v2"),
    "smoothing": ({}, dict(smooth=torch.ones(64)), "--format dense"),
    "low rank": ({}, dict(low_rank=LowRank(torch.ones(64, 2), torch.ones(2, 64))), "PEFT"),
    "float zeros": (dict(zeros=2.5), {}, "--format dense"),
    "huge scale": (dict(scale=1e6), {}, "65504"),
    "narrow": (dict(rows=40), {}, "compressed-tensors"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_it_cannot_carry_is_refused_with_the_format_that_can(what, single, tmp_path):
    given_base, parts, says = REFUSED[what]
    rows = given_base.get("rows", 64)
    zeros = torch.full((rows, 2), given_base.get("zeros", 3))
    base = UniformWeight.from_codes(torch.ones(rows, 64).long(), torch.full((rows, 2), given_base.get("scale", 0.1)), zeros, 4, 32)
    with pytest.raises(UsageError, match=f"up_proj.*{says}"):
        write(single(base, **parts), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_scales_finer_than_float16_are_reported(single, tmp_path):
    base = UniformWeight.from_codes(torch.ones(32, 32).long(), torch.full((32, 1), 0.1), None, 4, 32)
    assert any("rounded" in note for note in write(single(base), tmp_path / "out"))


def test_an_export_never_overwrites(single, on_grid, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        write(single(on_grid(torch.randn(64, 64))), tmp_path / "out")
    assert (tmp_path / "out/kept.txt").read_text() == "mine"


@pytest.fixture
def written(single, on_grid, tmp_path):
    write(single(on_grid(torch.randn(64, 64, generator=torch.Generator().manual_seed(5)))), tmp_path / "out")
    return tmp_path / "out"


def change(directory, **tensors):
    file = directory / "model.safetensors"
    kept = load_file(file)
    for name, tensor in tensors.items():
        full = f"model.layers.0.mlp.up_proj.{name}"
        if tensor is None:
            del kept[full]
        else:
            kept[full] = tensor
    save_file(kept, file)


BROKEN = {
    "missing part": (dict(scales=None), "scales is not in"),
    "short scales": (dict(scales=torch.ones(2, 63).half()), r"scales has shape \[2, 63\]"),
    "short zeros": (dict(qzeros=torch.ones(2, 7, dtype=torch.int32)), r"qzeros has shape \[2, 7\]"),
    "other bits": (dict(qweight=torch.ones(4, 64, dtype=torch.int32)), "2 bits .* config.json says 4"),
    "odd words": (dict(qweight=torch.ones(5, 64, dtype=torch.int32)), "no whole"),
    "float codes": (dict(qweight=torch.ones(8, 64)), "qweight is F32"),
    "flat": (dict(qweight=torch.ones(512, dtype=torch.int32)), "2 dimensions"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_wrong_shapes_name_tensor_and_file(what, written):
    tensors, says = BROKEN[what]
    change(written, **tensors)
    with pytest.raises(InputError, match=says) as caught:
        read(written)
    assert "model.safetensors" in str(caught.value) and "up_proj" in str(caught.value)


def test_groups_that_do_not_exist(written):
    change(written, g_idx=torch.arange(64, dtype=torch.int32))
    with pytest.raises(InputError, match="names groups 0…63; there are 2"):
        list(read(written).linears.values())


def test_reordered_groups_that_the_config_denies(written):
    change(written, g_idx=(torch.arange(64, dtype=torch.int32) // 32).flip(0))
    with pytest.raises(InputError, match="desc_act is false"):
        list(read(written).linears.values())


def test_a_truncated_file(written):
    file = written / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is no whole safetensors file"):
        read(written)


def test_pickle_files_are_not_opened(written):
    (written / "model.safetensors").unlink()
    (written / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="pickle"):
        read(written)


@pytest.mark.parametrize("entry", [{"checkpoint_format": "marlin"}, {"bits": 5}, {"quant_method": "awq"}, {"quant_method": "nobody"}])
def test_unknown_formats_and_versions(entry, written):
    config = json.loads((written / "config.json").read_text())
    config["quantization_config"] |= entry
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=str(next(iter(entry.values())))):
        registry.read(written)


def test_tied_embeddings_are_stored_twice_and_the_rope_base_under_both_names(case, on_grid, tmp_path):
    made = case("llama", on_grid, tie_word_embeddings=True)
    notes = write(made.checkpoint, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert any("lm_head.weight is stored as well as" in note for note in notes)
    assert read(tmp_path / "out").tied == {"lm_head.weight": "model.embed_tokens.weight"}
    write(made.checkpoint, tmp_path / "v2", version=2)
    assert "lm_head.weight" not in load_file(tmp_path / "v2/model.safetensors")
    assert not (tmp_path / "v2/quantize_config.json").exists()  # auto-gptq would take it for version 1
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500000.0


def test_model_card_states_perplexity_and_notes(single, on_grid, tmp_path):
    checkpoint = single(on_grid(torch.randn(64, 64)))
    card = {"title": "SmolLM2, 4 bits", "recipe": "stages:\n- quantize: {bits: 4}\n", "perplexity": 31.25, "protocol": {"seq_len": 512}}
    write(Checkpoint(checkpoint.config, checkpoint.linears, {}, card=card), tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    assert all(part in text for part in ("# SmolLM2, 4 bits", "| Perplexity | 31.25 |", "- quantize: {bits: 4}", "- seq len: 512"))


def test_act_order_and_symmetry_reach_the_config(single, on_grid, tmp_path):
    weight = torch.randn(64, 64)
    write(single(on_grid(weight, symmetric=True, act_order=True)), tmp_path / "a")
    write(single(partial(on_grid, group_size=-1)(weight)), tmp_path / "b")
    a, b = (json.loads((tmp_path / f"{n}/config.json").read_text())["quantization_config"] for n in "ab")
    assert (a["desc_act"], a["sym"], a["group_size"]) == (True, True, 32)
    assert (b["desc_act"], b["sym"], b["group_size"]) == (False, False, -1)
