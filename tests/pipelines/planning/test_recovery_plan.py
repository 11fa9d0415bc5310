"""What a recovery cannot do is refused before any work."""

from pathlib import Path
from typing import Any

import pytest
from bitmend.pipelines.errors import UsageError
from bitmend.pipelines.planning.plan import refusals
from bitmend.pipelines.recipes.recipe import resolve
from bitmend.pipelines.run import runner

from ..families import save_speaking
from ..runs import chosen

RTN: dict[str, Any] = {"quantize": {"method": "rtn", "group_size": 32}}
HEAD: dict[str, Any] = {"quantize": {"method": "rtn", "group_size": 32, "include_head": True}}
SVD: dict[str, Any] = {"decompose": {"method": "svdquant", "rank": 4}}
LOFTQ: dict[str, Any] = {"decompose": {"method": "loftq", "rank": 4}}


def recover(method: str, **settings: Any) -> dict[str, Any]:
    return {"recover": {"method": method, **settings}}


REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "rank": ([recover("lora", rank=200)], "lora: rank 200 does not fit model.layers.0.self_attn.q_proj, a layer of 128 × 128; choose 1…128"),
    "rank of increments": ([RTN, LOFTQ, recover("lota", rank=300)], "lota: rank 300 does not fit"),
    "bottleneck": ([recover("serial_adapter", bottleneck=300)], "bottleneck 300 does not fit a width of 128; choose 1…128"),
    "no sublayer": ([recover("parallel_adapter", targets="q")], "leave no attention or MLP sublayer"),
    "no such target": ([recover("lora", targets="nothing")], "targets 'nothing' and layers 'all' leave none of 28 linears"),
    "no such layer": ([recover("lora", layers="last:9")], "layers 'last:9': the model has 4 decoder blocks"),
    "nothing chosen is quantized": ([{"quantize": {**RTN["quantize"], "ignore": ["mlp"]}}, recover("scales")], "scales cannot serve"),
    "no bias": ([recover("bitfit", create=False)], "create=false leaves no trainable parameter: this model has no biases"),
    "all off": ([recover("perp", norms=False, biases=False)], "lora none leaves no trainable parameter"),
    "tokens": ([recover("prefix_tuning", tokens=500)], "500 virtual tokens and a seq_len of 256 do not fit a model of 512 positions"),
    "tokens somewhere": ([recover("prompt_tuning", layers="last:2")], "virtual tokens stand in front of the whole model"),
    "tokens twice": ([recover("prompt_tuning"), recover("prefix_tuning")], "recover.2: prefix_tuning trains virtual tokens, and recover puts"),
    "a prefix recomputed": ([recover("mam_adapter", gradient_checkpointing=True)], "set gradient_checkpointing=false"),
    "a compressed head": ([HEAD, recover("perp", head=True)], "the head is compressed and cannot train as a plain tensor"),
    "a rank that nothing reads": ([RTN, LOFTQ, recover("lora", rank=40)], "recover.rank: 40 would not be read: every chosen matrix has factors of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, small_model: Path, small_text: Path, tmp_path: Path) -> None:
    stages, words = REFUSED[case]
    lines = refusals(chosen(tmp_path, small_model, small_text, stages), small_model)
    assert lines and words in lines[0], lines


def test_what_is_ignored_or_left_alone_is_no_reason(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    """The chosen linears alone decide; factors that are there already train, whatever the rank would be by default."""
    some = [{"quantize": {**RTN["quantize"], "ignore": ["mlp"]}}, recover("scales", targets="q,k,v,o", norms=False)]
    for stages in (some, [RTN, LOFTQ, recover("lora")], [recover("bitfit", create=False, head=True)]):
        assert refusals(chosen(tmp_path, small_model, small_text, stages), small_model) == []


@pytest.mark.parametrize("sets", ["recover.rank=16", "decompose.bits=4", "decompose.symmetric=true"])
def test_what_stages_before_have_decided_is_refused_on_the_command_line_even_at_its_default(sets: str, small_model: Path) -> None:
    stages = [RTN, SVD if sets.startswith("decompose") else LOFTQ, recover("lora")]
    options = {"model": str(small_model), "profile": "demo"}
    assert refusals(resolve({"stages": stages}, options=options), small_model) == []
    (line,) = refusals(resolve({"stages": stages}, sets=[sets], options=options), small_model)
    assert line.startswith(sets.split("=")[0]) and "would not be read" in line


def test_evaluation_leaves_room_for_virtual_tokens(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    recipe = chosen(tmp_path, small_model, small_text, [recover("prompt_tuning")], evaluation={"seq_len": 500, "windows": 1})
    assert "16 virtual tokens and evaluation.seq_len 500 are above the 512 positions" in refusals(recipe, small_model)[0]


def test_a_teacher_of_another_vocabulary(small_model: Path, small_text: Path, tmp_path: Path) -> None:
    save_speaking("llama", tmp_path / "teacher", small_model)
    config = tmp_path / "teacher" / "config.json"
    config.write_text(config.read_text().replace('"vocab_size": 1024', '"vocab_size": 1032'))
    recipe = chosen(tmp_path, small_model, small_text, [RTN, recover("lora")], teacher=str(tmp_path / "teacher"))
    with pytest.raises(UsageError, match="recover: --teacher: its vocabulary has 1032 tokens, the model's has 1024"):
        runner.run(recipe, tmp_path / "run")
    assert not list((tmp_path / "run" / "stages").glob("*")), "before any work"
    with pytest.raises(UsageError, match="teacher: no stage of this recipe learns from one"):
        chosen(tmp_path, small_model, small_text, [RTN, recover("lora", loss="cross_entropy")], teacher=str(tmp_path / "teacher"))
