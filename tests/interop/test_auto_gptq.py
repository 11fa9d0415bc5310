"""auto-gptq 0.7.1, in the environment that `make interop` builds, reads ours and writes for us."""

import json
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from bitmend.compress.weights import DenseWeight, UniformWeight
from bitmend.pipelines import formats
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-interop" / "bin" / "python"
SCRIPT = Path(__file__).parent / "auto_gptq_runs.py"

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not PYTHON.is_file(), reason=f"auto-gptq's environment {PYTHON.parents[1].name} is missing; `make interop` builds it"
    ),
]

# family, bits, symmetric, group size, act-order, tied embeddings
OURS = [
    ("llama", 2, False, 32, False, False),
    ("llama", 2, True, 32, True, False),
    ("llama", 3, False, 32, True, False),
    ("llama", 3, True, 64, False, False),
    ("llama", 4, False, 32, False, True),
    ("llama", 4, True, -1, False, True),
    ("llama", 4, False, 32, True, False),
    ("llama", 8, False, 32, False, False),
    ("llama", 8, True, 32, True, True),
    ("opt", 4, False, 32, True, False),
    ("gpt2", 3, False, 32, False, True),
    ("gpt_neox", 4, False, 64, False, False),
]
# family, bits, sym, group size, desc_act, static_groups
THEIRS = [
    ("llama", 2, False, 32, False, False),
    ("llama", 3, True, 32, False, False),
    ("llama", 3, False, 32, True, False),
    ("llama", 4, False, 32, True, False),
    ("llama", 4, False, 32, True, True),
    ("llama", 4, True, -1, True, False),
    ("llama", 8, False, 64, False, False),
    ("opt", 4, False, 32, False, False),
    ("gpt2", 4, False, 32, False, False),
]


def run(verb: str, jobs: list[dict], place: Path) -> None:
    file = place / f"{verb}.json"
    file.write_text(json.dumps(jobs))
    done = subprocess.run([PYTHON, SCRIPT, verb, file], capture_output=True, text=True, cwd=place, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def densely(model, back):
    """A plain model with the weights we read."""
    weights = {name: record.dense() for name, record in back.linears.items()}
    state = {f"{name}.weight": weight.t() if name in back.transposed else weight for name, weight in weights.items()}
    state |= {name: tensor.float() for name, tensor in back.tensors.items()}
    state |= {alias: state[source] for alias, source in back.tied.items()}
    model.load_state_dict(state, strict=True)
    return model


def label(settings: tuple) -> str:
    return "-".join(map(str, settings))


@pytest.fixture(scope="module")
def ours(case, on_grid, tokens, tmp_path_factory):
    """label → (our logits, auto-gptq's), and one directory in shards."""
    place = tmp_path_factory.mktemp("ours")
    made, jobs = {}, []
    for settings in [*OURS, "sharded"]:
        family, bits, symmetric, group, act_order, tied = OURS[0] if settings == "sharded" else settings
        grid = partial(on_grid, bits=bits, symmetric=symmetric, group_size=group, act_order=act_order)
        name = settings if settings == "sharded" else label(settings)
        made[name] = case(family, grid, tie_word_embeddings=tied)
        formats.write("gptq", made[name].checkpoint, place / name, **({"shard_bytes": 60_000} if name == "sharded" else {}))
        jobs.append({"directory": str(place / name), "tokens": tokens.tolist(), "output": str(place / f"{name}.safetensors")})
    run("logits", jobs, place)
    return {name: (one.logits(), load_file(place / f"{name}.safetensors")["logits"]) for name, one in made.items()}


@pytest.mark.parametrize("name", [*map(label, OURS), "sharded"])
def test_auto_gptq_loads_ours_and_gives_the_same_logits(name, ours):
    mine, theirs = ours[name]
    torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def theirs(case, tokens, logits_of, tmp_path_factory):
    """label → (auto-gptq's logits, ours from what we read, the checkpoint we read)."""
    place = tmp_path_factory.mktemp("theirs")
    plain = {family: case(family, lambda weight: DenseWeight(weight.clone())) for family in {settings[0] for settings in THEIRS}}
    for family, made in plain.items():
        formats.write("dense", made.checkpoint, place / family)
    quantize, load = [], []
    for settings in THEIRS:
        family, bits, sym, group, desc_act, static = settings
        output = str(place / label(settings))
        quantize.append(
            dict(
                directory=str(place / family), output=output, bits=bits, sym=sym, group_size=group, desc_act=desc_act, static_groups=static
            )
        )
        load.append({"directory": output, "tokens": tokens.tolist(), "output": f"{output}.safetensors"})
    run("quantize", quantize, place)
    run("logits", load, place)
    out = {}
    for settings in THEIRS:
        back, model = formats.read(place / label(settings)), plain[settings[0]].model
        out[label(settings)] = (load_file(place / f"{label(settings)}.safetensors")["logits"], logits_of(densely(model, back)), back)
    return out


@pytest.mark.parametrize("settings", THEIRS, ids=label)
def test_what_auto_gptq_quantized_comes_in_with_the_same_logits(settings, theirs):
    logits, mine, back = theirs[label(settings)]
    torch.testing.assert_close(mine, logits, rtol=0, atol=1e-5)
    for record in back.linears.values():
        assert isinstance(record.base, UniformWeight)
        assert record.base.bits == settings[1] and record.base.symmetric == settings[2]
        assert (record.base.group_index is not None) == (settings[4] and not settings[5] and settings[3] != -1)


ODD_ZEROS = [(bits, reordered) for bits in (2, 3, 4, 8) for reordered in (False, True)]


@pytest.fixture(scope="module")
def odd_zeros(case, on_grid, tokens, logits_of, tmp_path_factory):
    """Files with a stored zero of 2^bits − 1, which auto-gptq takes for 0 on one of its paths and for 2^bits on the other."""
    place = tmp_path_factory.mktemp("odd")
    made, jobs = {}, []
    for bits, reordered in ODD_ZEROS:
        name = f"{bits}-{reordered}"
        made[name] = case("llama", partial(on_grid, bits=bits, act_order=reordered))
        formats.write("gptq", made[name].checkpoint, place / name)
        file = place / name / "model.safetensors"
        tensors = load_file(file)
        for key in (key for key in tensors if key.endswith("qzeros")):
            tensors[key][:, -1] = -1  # the last few columns; -1 has every bit set
        save_file(tensors, file)
        jobs.append({"directory": str(place / name), "tokens": tokens.tolist(), "output": str(place / f"{name}.safetensors")})
    run("logits", jobs, place)
    out = {}
    for name, one in made.items():
        before = one.logits()
        out[name] = (load_file(place / f"{name}.safetensors")["logits"], logits_of(densely(one.model, formats.read(place / name))), before)
    return out


@pytest.mark.parametrize(("bits", "reordered"), ODD_ZEROS)
def test_zeros_that_wrap_are_read_as_auto_gptq_reads_them(bits, reordered, odd_zeros):
    theirs, mine, before = odd_zeros[f"{bits}-{reordered}"]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-4)
    assert (before - theirs).abs().max() > 0.1
