import json
from functools import partial

import pytest
import torch
from bitmend.compress.weights import DenseWeight, LowRank, StoredWeight, UniformWeight
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.formats import read, registry
from bitmend.pipelines.formats.checkpoint import Checkpoint
from bitmend.pipelines.formats.compressed_tensors import pack, write
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
UP = "model.layers.0.mlp.up_proj"


@st.composite
def uniform_weights(draw):
    """Any shape: this format has no multiples of 32."""
    bits = draw(st.sampled_from([2, 3, 4, 8]))
    rows, size, groups = draw(st.integers(1, 40)), draw(st.integers(1, 48)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    codes = torch.randint(0, 1 << bits, (rows, size * groups), generator=generator)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator)
    scales = torch.rand(rows, groups, generator=generator).add(1e-3).half()
    return UniformWeight.from_codes(codes, scales, None if draw(st.booleans()) else zeros, bits, size)


@settings(max_examples=40, deadline=None)
@given(uniform_weights())
def test_what_is_written_is_read_back_exactly(single, tmp_path_factory, base):
    directory = tmp_path_factory.mktemp("ct") / "out"
    write(single(base), directory)
    back = read(directory)
    (record,) = back.linears.values()
    assert isinstance(record.base, UniformWeight)
    assert torch.equal(record.dense(), base.dense())
    assert (record.base.bits, record.base.symmetric, record.base.group_size) == (base.bits, base.symmetric, base.group_size)
    assert torch.equal(back.tensors["model.norm.weight"], torch.ones(base.in_features))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [5, 6])
def test_codes_of_5_and_6_bits_are_written_in_8(bits, symmetric, single, tmp_path):
    generator = torch.Generator().manual_seed(bits)
    codes, zeros = (torch.randint(0, 1 << bits, shape, generator=generator) for shape in ((7, 48), (7, 3)))
    base = UniformWeight.from_codes(codes, torch.rand(7, 3, generator=generator).half(), None if symmetric else zeros, bits, 16)
    notes = write(single(base), tmp_path / "out")
    (record,) = read(tmp_path / "out").linears.values()
    assert torch.equal(record.dense(), base.dense())
    assert isinstance(record.base, UniformWeight) and (record.base.bits, record.base.symmetric) == (8, symmetric)
    assert any("1 linears have codes of 5 or 6 bits" in note for note in notes)


@settings(max_examples=40, deadline=None)
@given(uniform_weights())
def test_the_package_itself_unpacks_the_same_weights(base):
    parts, _ = pack("x", StoredWeight(base))
    arguments = dict(num_bits=base.bits, type="int", symmetric=base.symmetric, strategy="group", group_size=base.group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))  # type: ignore[arg-type]
    out = PackedQuantizationCompressor.decompress({**parts, "weight_scale": parts["weight_scale"].float()}, scheme)
    assert torch.equal(out["weight"], base.dense())


GRIDS = [(bits, symmetric, group) for bits in (2, 3, 4, 8) for symmetric in (True, False) for group in (32, -1)] + [(4, False, 64)]


@pytest.mark.parametrize(("bits", "symmetric", "group_size"), GRIDS)
def test_transformers_gives_the_same_logits(bits, symmetric, group_size, case, on_grid, logits_of, tmp_path):
    made = case("llama", partial(on_grid, bits=bits, symmetric=symmetric, group_size=group_size))
    write(made.checkpoint, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    if not symmetric:  # it dequantizes while loading, in the float16 of the scales
        for name, record in made.checkpoint.linears.items():
            made.model.get_submodule(name).weight.data = record.dense(torch.float16).float()
    torch.testing.assert_close(logits_of(loaded), made.logits(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "qwen3_moe"])
def test_other_families(kind, case, on_grid, logits_of, tmp_path):
    made = case(kind, partial(on_grid, symmetric=True))
    write(made.checkpoint, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for parameter in loaded.parameters():
        parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
    for name, parameter in made.model.named_parameters():
        if parameter.dim() == 3:  # fused experts are dequantized in float16
            for expert in range(parameter.shape[0]):
                parameter.data[expert] = made.checkpoint.linears[f"{name}.{expert}"].dense(torch.float16).float()
    torch.testing.assert_close(logits_of(loaded), made.logits(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "qwen3_moe", "mixtral"])
def test_it_comes_back_under_the_names_in_memory(kind, case, on_grid, tmp_path):
    made = case(kind, partial(on_grid, symmetric=True))
    write(made.checkpoint, tmp_path / "out")
    back = read(tmp_path / "out")
    assert set(back.linears) == set(made.checkpoint.linears) and set(back.tensors) == set(made.checkpoint.tensors)
    for name, record in made.checkpoint.linears.items():
        assert torch.equal(back.linears[name].dense(), record.dense())
    for name, tensor in made.checkpoint.tensors.items():
        assert torch.equal(back.tensors[name], tensor)


def test_mixed_bits_load_in_transformers(case, on_grid, logits_of, tmp_path):
    def extra(name, record):
        if "o_proj" in name:
            return StoredWeight(DenseWeight(record.dense()))
        return StoredWeight(on_grid(record.dense(), bits=8, group_size=-1, symmetric=True)) if "mlp" in name else record

    made = case("llama", partial(on_grid, symmetric=True), extra)
    write(made.checkpoint, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits_of(loaded), made.logits(), rtol=0, atol=1e-5)


def test_masked_weights_ship_as_exact_zeros(single, on_grid, tmp_path):
    kept = torch.rand(64, 64, generator=torch.Generator().manual_seed(2)) > 0.5
    record = StoredWeight(on_grid(torch.randn(64, 64))).with_mask(kept)
    notes = write(single(record.base, mask=record.mask), tmp_path / "out")
    (back,) = read(tmp_path / "out").linears.values()
    assert torch.equal(back.dense(), record.dense()) and bool((back.dense()[~kept] == 0).all())
    assert any("masks themselves" in note for note in notes)


def test_a_compressed_head_that_is_the_embedding_too_is_written_twice(case, on_grid, logits_of, tmp_path):
    made = case("llama", partial(on_grid, symmetric=True), tie_word_embeddings=True)
    checkpoint = made.checkpoint
    table = on_grid(checkpoint.tensors["model.embed_tokens.weight"], bits=8, symmetric=True)
    made.model.model.embed_tokens.weight.data = table.dense()
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name != "model.embed_tokens.weight"}
    linears = {**checkpoint.linears, "lm_head": StoredWeight(table)}
    for name in ("compressed-tensors", "dense"):
        both = Checkpoint(checkpoint.config, linears, tensors, None, tied=checkpoint.tied)
        notes = registry.write(name, both, tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        torch.testing.assert_close(logits_of(loaded), made.logits(), rtol=0, atol=1e-5)
        assert any("both copies" in note for note in notes) == (name != "dense")


def test_refusals(case, on_grid, tmp_path):
    weight = torch.randn(64, 64)
    plain = on_grid(weight)
    cases = {
        "g_idx.*--format gptq": StoredWeight(on_grid(weight, act_order=True)),
        "PEFT": StoredWeight(plain, low_rank=LowRank(torch.ones(64, 2), torch.ones(2, 64))),
        "--format dense folds": StoredWeight(plain, smooth=torch.ones(64)),
        "fractions": StoredWeight(UniformWeight(plain.codes, plain.scales, torch.full((64, 2), 2.5), 4, 32, 64)),
    }
    for says, record in cases.items():
        with pytest.raises(UsageError, match=f"up_proj.*{says}"):
            write(Checkpoint(CONFIG, {UP: record}, {}), tmp_path / "out")
    with pytest.raises(UsageError, match=r"Conv1D.*--format gptq"):
        write(case("gpt2", on_grid).checkpoint, tmp_path / "out")
    with pytest.raises(UsageError, match="without zero points"):
        write(case("mixtral", on_grid).checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def written(single, on_grid, tmp_path):
    write(single(on_grid(torch.randn(64, 64))), tmp_path / "out")
    return tmp_path / "out"


BROKEN = {
    "packed too short": (dict(weight_packed=torch.ones(64, 7, dtype=torch.int32)), "7 words a row; 64 weights of 4 bits need 8"),
    "rows": (dict(weight_packed=torch.ones(63, 8, dtype=torch.int32)), "63 rows"),
    "no scale": (dict(weight_scale=None), "weight_scale is not"),
    "scale": (dict(weight_scale=torch.ones(64, 3)), "does not divide"),
    "zeros": (dict(weight_zero_point=torch.ones(7, 2, dtype=torch.int32)), r"need \[8, 2\]"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_wrong_shapes_name_tensor_and_file(what, written):
    parts, says = BROKEN[what]
    file = written / "model.safetensors"
    tensors = load_file(file)
    for part, tensor in parts.items():
        tensors.pop(f"{UP}.{part}")
        if tensor is not None:
            tensors[f"{UP}.{part}"] = tensor
    save_file(tensors, file)
    with pytest.raises(InputError, match=says) as caught:
        read(written)
    assert "model.safetensors" in str(caught.value) and UP in str(caught.value)


FOREIGN = [
    ({"format": "float-quantized"}, "float-quantized"),
    ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
    ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}, "input_activations": {"num_bits": 8}}}}, "input activations"),
    ({"config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}}}, "type float"),
]


@pytest.mark.parametrize(("entry", "says"), FOREIGN)
def test_other_layouts_of_the_package(entry, says, written):
    config = json.loads((written / "config.json").read_text())
    config["quantization_config"] |= entry
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=says):
        read(written)
