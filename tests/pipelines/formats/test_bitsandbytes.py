import json
from functools import partial

import bitsandbytes.functional as bnb
import pytest
import torch
from bitmend.compress import normal_float
from bitmend.compress.packing import pack_codes
from bitmend.compress.weights import DenseWeight, LowRank, NormalFloatWeight, StoredWeight
from bitmend.pipelines.errors import InputError, UsageError
from bitmend.pipelines.formats import read, registry
from bitmend.pipelines.formats.bitsandbytes import STATE, pack, write
from bitmend.pipelines.formats.checkpoint import Checkpoint
from bitsandbytes.nn import Linear4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
UP = "model.layers.0.mlp.up_proj"


def quantized(weight: torch.Tensor, block_size: int = 64, double: bool = False) -> NormalFloatWeight:
    """What bitsandbytes itself makes of a weight, as our record."""
    packed, state = bnb.quantize_4bit(weight, blocksize=block_size, compress_statistics=double, quant_type="nf4")
    flat = packed.reshape(-1)
    codes = pack_codes(torch.stack((flat >> 4, flat & 15), -1).view(weight.shape), 4)
    rows = weight.shape[0]
    if not double:
        return NormalFloatWeight(codes, 4, block_size, weight.shape[1], state.absmax.view(rows, -1))
    assert state.state2 is not None and state.offset is not None
    scales, offset = state.state2.absmax, state.offset.reshape(1)
    return NormalFloatWeight(codes, 4, block_size, weight.shape[1], None, state.absmax.view(rows, -1), scales, offset)


def exact(model):
    """Without the bfloat16 shortcut that bitsandbytes takes on CPUs with AVX512-BF16, to compare more than three digits."""
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@st.composite
def normal_float_weights(draw):
    rows, block, groups = draw(st.integers(1, 40)), draw(st.sampled_from([32, 64, 128])), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return quantized(torch.randn(rows, block * groups, generator=generator), block, draw(st.booleans()))


@settings(max_examples=40, deadline=None)
@given(normal_float_weights())
def test_what_is_written_is_read_back_exactly(single, tmp_path_factory, base):
    directory = tmp_path_factory.mktemp("bnb") / "out"
    write(single(base), directory)
    back = read(directory)
    (record,) = back.linears.values()
    assert isinstance(record.base, NormalFloatWeight)
    assert torch.equal(record.dense(), base.dense())
    assert (record.base.absmax is None) == (base.absmax is None)
    assert torch.equal(back.tensors["model.norm.weight"], torch.ones(base.in_features))


@settings(max_examples=40, deadline=None)
@given(normal_float_weights())
def test_the_package_itself_dequantizes_to_the_same_weights(base):
    parts = {name.removeprefix("weight."): tensor for name, tensor in pack("x", StoredWeight(base), torch.float32).items()}
    packed = parts.pop("weight")
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    torch.testing.assert_close(bnb.dequantize_4bit(packed, state), base.dense(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2", "gpt_neox"])
def test_transformers_gives_the_same_logits(kind, double, case, logits_of, tmp_path):
    made = case(kind, partial(quantized, double=double))
    write(made.checkpoint, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert loaded.is_loaded_in_4bit
    torch.testing.assert_close(logits_of(exact(loaded)), made.logits(), rtol=0, atol=2e-5)
    back = read(tmp_path / "out")
    assert set(back.linears) == set(made.checkpoint.linears) and set(back.tensors) == set(made.checkpoint.tensors)
    for name, record in made.checkpoint.linears.items():
        assert torch.equal(back.linears[name].dense(), record.dense())


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_checkpoint_that_bitsandbytes_saved_comes_in_with_the_same_logits(kind, double, case, logits_of, tmp_path):
    made = case(kind, lambda weight: DenseWeight(weight.clone()))
    registry.write("dense", made.checkpoint, tmp_path / "plain")
    settings_4bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=torch.float32
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32, quantization_config=settings_4bit)
    theirs.save_pretrained(tmp_path / "theirs")
    back = read(tmp_path / "theirs")
    assert set(back.linears) == set(made.checkpoint.linears)
    ours = made.model
    for name, record in back.linears.items():
        assert isinstance(record.base, NormalFloatWeight)
        weight = record.dense()
        ours.get_submodule(name).weight.data = weight.t() if kind == "gpt2" else weight
    torch.testing.assert_close(logits_of(exact(theirs)), logits_of(ours), rtol=0, atol=2e-5)


def test_peft_loads_an_adapter_on_the_4bit_base(case, logits_of, tmp_path):
    def extra(name, record):
        generator = torch.Generator().manual_seed(len(name))
        up, down = torch.randn(record.shape[0], 4, generator=generator), torch.randn(4, record.shape[1], generator=generator)
        return StoredWeight(record.base, low_rank=LowRank(up * 0.1, down * 0.1))

    made = case("llama", quantized, extra)
    registry.write("bnb", made.checkpoint, tmp_path / "out", adapter=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "out/adapter"))
    torch.testing.assert_close(logits_of(exact(model)), made.logits(), rtol=0, atol=5e-5)


def test_blocks_that_run_across_rows_come_in_densely(single, tmp_path):
    weight = torch.randn(4, 96)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    directory = tmp_path / "out"
    write(single(quantized(torch.randn(4, 192))), directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "hidden_size": 96}))
    tensors = {f"{UP}.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    save_file({**tensors, f"{UP}.weight": packed}, directory / "model.safetensors")
    (record,) = read(directory).linears.values()
    assert isinstance(record.base, DenseWeight)
    state.shape = torch.Size([weight.numel()])  # its CPU kernel (0.50.2) restarts blocks at each row, where its quantizer does not
    torch.testing.assert_close(record.dense().reshape(-1), bnb.dequantize_4bit(packed, state).reshape(-1), rtol=0, atol=1e-6)
    assert (record.dense() - weight).abs().max() < 0.6


def test_masked_weights_ship_as_exact_zeros(single, tmp_path):
    kept = torch.rand(64, 64, generator=torch.Generator().manual_seed(2)) > 0.5
    record = StoredWeight(quantized(torch.randn(64, 64))).with_mask(kept)
    notes = write(single(record.base, mask=record.mask), tmp_path / "out")
    (back,) = read(tmp_path / "out").linears.values()
    assert torch.equal(back.dense(), record.dense()) and bool((back.dense()[~kept] == 0).all())
    assert any("masks themselves" in note for note in notes)


def test_linears_left_dense_are_left_alone_by_transformers(case, logits_of, tmp_path):
    made = case("llama", quantized, lambda name, record: StoredWeight(DenseWeight(record.dense())) if "v_proj" in name else record)
    write(made.checkpoint, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(loaded.model.layers[0].self_attn.v_proj) is torch.nn.Linear
    torch.testing.assert_close(logits_of(exact(loaded)), made.logits(), rtol=0, atol=2e-5)


def test_refusals(case, on_grid, tmp_path):
    base = quantized(torch.randn(64, 64))
    nf3 = NormalFloatWeight(pack_codes(torch.zeros(64, 64).long(), 3), 3, 64, 64, torch.ones(64, 1))
    odd = NormalFloatWeight(base.codes, 4, 16, 64, torch.ones(64, 4))
    cases = {
        "--format gptq": StoredWeight(on_grid(torch.randn(64, 64))),
        "NormalFloat3": StoredWeight(nf3),
        "not 16": StoredWeight(odd),
        "folds": StoredWeight(base, smooth=torch.ones(64)),
    }
    for says, record in cases.items():
        with pytest.raises(UsageError, match=f"up_proj.*{says}"):
            write(Checkpoint(CONFIG, {UP: record}, {}), tmp_path / "out")
    with pytest.raises(UsageError, match="fused experts"):
        write(case("mixtral", quantized).checkpoint, tmp_path / "out")
    for name in ("gptq", "gptq-v2", "compressed-tensors"):
        with pytest.raises(UsageError, match="--format bnb carries NF4"):
            registry.write(name, Checkpoint(CONFIG, {UP: StoredWeight(base)}, {}), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def written(single, tmp_path):
    write(single(quantized(torch.randn(64, 64), double=True)), tmp_path / "out")
    return tmp_path / "out"




def stated(**changed):
    fields = {"shape": [64, 64], "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.1} | changed
    return {STATE: torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)}


BROKEN = {
    "codes": (dict(weight=torch.ones(2047, 1, dtype=torch.uint8)), "2047 bytes"),
    "absmax": ({"weight.absmax": torch.ones(63, dtype=torch.uint8)}, r"need \[64\]"),
    "nested": ({"weight.nested_absmax": None}, "nested_absmax is not"),
    "json": ({STATE: torch.tensor(list(b"{"), dtype=torch.uint8)}, "not the JSON"),
    "shape": ({STATE: torch.tensor(list(b'{"blocksize": 64}'), dtype=torch.uint8)}, "shape"),
    "no codes": ({"weight": None}, "weight is not"),
    "no block": (stated(blocksize=0), "not the JSON"),
    "no outer block": (stated(nested_blocksize=0), "not the JSON"),
    "half a row": (stated(shape=[64, 63.5]), "not the JSON"),
    "no offset": (stated(nested_offset=None), "not the JSON"),
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


def test_another_code_book(written):
    file = written / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{UP}.weight.quant_map"] = torch.linspace(-1, 1, 16)
    save_file(tensors, file)
    with pytest.raises(InputError, match="not the table"):
        list(read(written).linears.values())


def test_eight_bits_and_fp4(written):
    file = written / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{UP}.weight.quant_state.bitsandbytes__fp4"] = tensors.pop(f"{UP}.{STATE}")
    save_file(tensors, file)
    with pytest.raises(InputError, match="only NF4 is read, not fp4"):
        read(written)
    config = json.loads((written / "config.json").read_text())
    config["quantization_config"] |= {"load_in_4bit": False, "load_in_8bit": True}
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="8-bit"):
        read(written)


def test_the_tables_are_the_packages_own():
    _, state = bnb.quantize_4bit(torch.randn(64, 64), compress_statistics=True, quant_type="nf4")
    assert state.code is not None and state.state2 is not None
    assert torch.equal(state.code, normal_float.code_book(4))
    assert torch.equal(state.state2.code, normal_float.dynamic_map())


def test_a_uniform_model_has_nothing_for_it(case, tmp_path):
    made = case("llama", lambda weight: DenseWeight(weight.clone()))
    with pytest.raises(UsageError, match="no linear of this model is NormalFloat4"):
        write(made.checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())
