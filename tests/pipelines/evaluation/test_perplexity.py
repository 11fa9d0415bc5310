"""The numbers: equal to what transformers computes, to themselves, and to the files."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.evaluation import measure, perplexity
from bitmend.pipelines.evaluation.perplexity import BaselineOutputs
from bitmend.pipelines.evaluation.scores import Scores, load_scores, save_scores
from bitmend.pipelines.models import state_checkpoints
from bitmend.pipelines.models.blocks import StreamedModel
from bitmend.pipelines.run import runner
from bitmend.pipelines.run.evaluate import evaluate
from bitmend.pipelines.stages.inputs import Inputs
from bitmend.pipelines.store.artifact import Artifact
from bitmend.pipelines.text.data import Windows
from bitmend.reports.record import paired_difference
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..runs import chosen, stage_directory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def baseline(finished: Path) -> Artifact:
    return runner.last_artifact(finished, "baseline")


@pytest.fixture(scope="module")
def windows(small_model: Path, small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Windows:
    """Those of the finished run."""
    recipe = chosen(tmp_path_factory.mktemp("recipe"), small_model, small_text)
    return Inputs(recipe, small_model).evaluation()


def direct(model: Path, ids_NT: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood of each window by transformers' own loss."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        return [float(loaded(ids.unsqueeze(0), labels=ids.unsqueeze(0)).loss) for ids in ids_NT]


def stages(run: Path) -> dict[str, Any]:
    return {s.stage: s for s in runner.record(run).stages}


def test_it_is_what_transformers_computes(baseline: Artifact, windows: Windows, small_model: Path, finished: Path) -> None:
    expected = direct(small_model, windows.ids)
    scores, _ = perplexity.score(StreamedModel(baseline, CPU), windows)
    assert scores.nll == pytest.approx(expected, rel=1e-5)
    assert scores.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-5)
    assert stages(finished)["baseline"].perplexity == scores.perplexity
    assert scores.kl is None and scores.top1 is None


def test_long_windows_are_scored_in_spans(baseline: Artifact, windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = perplexity.score(StreamedModel(baseline, CPU), windows)
    monkeypatch.setattr(perplexity, "LOGITS_AT_ONCE", 17)
    monkeypatch.setattr(perplexity, "TOKENS_AT_ONCE", 64)
    parts, _ = perplexity.score(StreamedModel(baseline, CPU), windows)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-6)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The blocks that were loaded, in order."""
    result: list[int] = []
    plain = StreamedModel.load_block
    monkeypatch.setattr(StreamedModel, "load_block", lambda model, index: (result.append(index), plain(model, index))[1])
    return result


def test_texts_share_one_pass_and_keep_their_bits(baseline: Artifact, windows: Windows, loaded: list[int]) -> None:
    shorter = Windows(windows.ids[:, :40].flip(0).contiguous(), None, windows.protocol)
    texts = {"a": windows, "b": shorter, "c": Windows(windows.ids[:1], None, windows.protocol)}
    model = StreamedModel(baseline, CPU)
    alone = {name: perplexity.score(model, text) for name, text in texts.items()}
    teachers = {name: BaselineOutputs(hidden.window, model.logits) for name, (_, hidden) in alone.items() if name != "a"}
    loaded.clear()
    together = perplexity.score_texts(StreamedModel(baseline, CPU), {name: (text, teachers.get(name)) for name, text in texts.items()})
    assert loaded == [0, *range(model.structure.blocks)]  # the first one once more, to learn what a block returns
    assert [scores.kl is None for scores, _ in together.values()] == [True, False, False]
    for name, (scores, actual) in together.items():
        assert scores.nll == alone[name][0].nll and torch.equal(actual.whole(), alone[name][1].whole())


@pytest.mark.parametrize("behind", [0, 1])
def test_a_killed_evaluation_goes_on_where_it_was(
    behind: int, finished: Path, windows: Windows, tmp_path: Path, loaded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended in block 1, before or behind a checkpoint; another set of texts does not begin there."""
    quantized, forward = runner.last_artifact(finished, "quantize"), measure.ForwardPass(CPU, torch.float32)
    texts = {"": windows, "news": Windows(windows.ids[:3], None, windows.protocol | {"dataset": "news"})}
    whole = measure.scores_of(quantized, tmp_path / "whole", texts, None, forward)
    monkeypatch.setattr(state_checkpoints, "SECONDS", 0.0 if behind else 60.0)
    plain = StreamedModel.run_block
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def run_block(model: StreamedModel, index: int, hidden: torch.Tensor) -> torch.Tensor:
            if index == 1:
                raise KeyboardInterrupt
            return plain(model, index, hidden)

        patch.setattr(StreamedModel, "run_block", run_block)
        measure.scores_of(quantized, tmp_path / "killed", texts, None, forward)
    loaded.clear()
    again = measure.scores_of(quantized, tmp_path / "killed", texts, None, forward)
    assert [index for index in loaded if index == 0] == [0] * (2 - behind), "to learn what a block returns, and (without a checkpoint) to run it"
    assert {name: scores for name, (scores, _) in again.items()} == {name: scores for name, (scores, _) in whole.items()}
    assert not [*tmp_path.rglob("walked-*")]


def test_what_was_measured_before_is_read(baseline: Artifact, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that is added later is measured alone."""
    asked: list[int] = []
    plain = perplexity.score_texts
    monkeypatch.setattr(perplexity, "score_texts", lambda model, texts, *more: (asked.append(len(texts)), plain(model, texts, *more))[1])
    texts = {"": windows, "news": Windows(windows.ids[:1], None, windows.protocol | {"dataset": "news"})}
    forward = measure.ForwardPass(CPU, torch.float32)
    first = measure.scores_of(baseline, tmp_path, {"": windows}, None, forward)
    both = measure.scores_of(baseline, tmp_path, dict(reversed(texts.items())), None, forward)
    again = measure.scores_of(baseline, tmp_path, texts, None, forward)
    compared = measure.scores_of(baseline, tmp_path / "another", texts, measure.Baseline(baseline, tmp_path), forward)
    assert asked == [1, 1, 2]
    assert both[""][0] == first[""][0] == again[""][0] and list(both) == ["news", ""]
    assert compared["news"][0].kl == pytest.approx([0.0], abs=1e-7) and compared[""][0].nll == first[""][0].nll
    left = tmp_path / f"walked-00002-{perplexity.protocol_key(windows)}.safetensors"
    left.touch()
    measure.scores_of(baseline, tmp_path, texts, None, forward)
    assert asked == [1, 1, 2] and not left.exists(), "what a kill behind the last text left goes"
    (tmp_path / f"{perplexity.protocol_key(windows)}.hidden.safetensors").unlink()
    measure.scores_of(baseline, tmp_path, texts, None, forward)
    assert asked[3:] == [1], "without its states a baseline is measured again"


def test_the_baseline_agrees_with_itself(baseline: Artifact, windows: Windows) -> None:
    model = StreamedModel(baseline, CPU)
    _, hidden = perplexity.score(model, windows)
    scores, _ = perplexity.score(StreamedModel(baseline, CPU), windows, BaselineOutputs(hidden.window, model.logits))
    assert scores.kl == pytest.approx([0.0] * len(windows.ids), abs=1e-7)
    assert scores.top1 == (1.0,) * len(windows.ids)


def test_kl_and_agreement_are_what_they_say(finished: Path, baseline: Artifact, windows: Windows, small_model: Path) -> None:
    """Against dense logits of both models, by hand."""
    quantized = runner.last_artifact(finished, "quantize")
    student = AutoModelForCausalLM.from_pretrained(small_model)
    for name in quantized.linears:
        student.get_submodule(name).weight.data = quantized.stored(name).dense()
    teacher = AutoModelForCausalLM.from_pretrained(small_model)
    with torch.no_grad():
        p, q = (torch.log_softmax(m(windows.ids).logits[:, :-1], -1) for m in (teacher, student))
    made = stages(finished)["quantize"]
    assert made.kl_to_baseline == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert made.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert made.kl_to_baseline > 0 and made.top1_agreement < 1


def test_bits_per_byte_is_of_the_text(finished: Path, windows: Windows, small_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    size = len("".join(tokenizer.decode(ids[1:]) for ids in windows.ids).encode())
    made = stages(finished)["baseline"]
    tokens = windows.ids.shape[0] * (windows.ids.shape[1] - 1)
    assert made.bits_per_byte == pytest.approx(math.log(made.perplexity) * tokens / math.log(2) / size, rel=0.01)


def test_the_paired_error_is_of_differences(finished: Path) -> None:
    measured = {}
    for address in ("baseline", "prune", "quantize"):
        place = stage_directory(finished, address).with_suffix(".metrics")
        measured[address] = torch.tensor(json.loads(next(place.glob("????????.json")).read_text())["nll"], dtype=torch.float64)
    made = stages(finished)["quantize"]
    for before, value, error in (
        ("baseline", made.nll_difference, made.nll_difference_stderr),
        ("prune", made.nll_difference_previous, made.nll_difference_previous_stderr),
    ):
        difference = measured["quantize"] - measured[before]
        assert value == pytest.approx(float(difference.mean()))
        assert error == pytest.approx(float(difference.std(correction=1)) / math.sqrt(len(difference)))
    unpaired = float(measured["quantize"].std()) / math.sqrt(len(measured["quantize"]))
    assert made.nll_difference_stderr is not None and made.nll_difference_stderr < unpaired / 3
    assert paired_difference((1.0, 2.0), (1.0, 2.0)) == (0.0, 0.0)


def test_the_gap_closed_is_of_logarithms(finished: Path) -> None:
    made = stages(finished)
    base, before, after = (made[a].perplexity for a in ("baseline", "quantize", "decompose"))
    assert made["decompose"].gap_closed == pytest.approx(1 - math.log(after / base) / math.log(before / base))
    assert made["decompose"].perplexity_ratio == pytest.approx(after / base)
    assert made["baseline"].gap_closed is None


def test_eval_inside_a_run_gives_the_runs_number(finished: Path) -> None:
    for address, made in stages(finished).items():
        actual = evaluate(str(stage_directory(finished, address)), device="cpu")
        assert actual["perplexity"] == pytest.approx(made.perplexity, rel=1e-9), address
        assert actual["total_bytes"] == made.total_bytes
    protocol = runner.record(finished).protocol
    assert (actual["protocol"]["windows"], actual["protocol"]["seq_len"]) == (protocol.windows, protocol.seq_len)
    assert actual["protocol"]["fingerprint"] == protocol.fingerprint, "the same part of the text, not the whole of it"
    assert evaluate(str(finished), device="cpu")["perplexity"] == actual["perplexity"], "a run is its last stage"


def test_eval_takes_what_it_is_told(finished: Path, small_text: Path, tmp_path: Path) -> None:
    place = str(stage_directory(finished, "quantize"))
    fewer = evaluate(place, windows=2, seq_len=32, device="cpu")
    assert (fewer["protocol"]["windows"], fewer["protocol"]["seq_len"]) == (2, 32)
    assert fewer["protocol"]["fingerprint"] == runner.record(finished).protocol.fingerprint
    other = tmp_path / "other.txt"
    other.write_text("A text of its own, about nothing in particular. " * 40)
    assert evaluate(place, eval_source=str(other), seq_len=64, device="cpu")["protocol"]["dataset"] == "other.txt"


def test_eval_of_a_model_outside(small_model: Path, small_text: Path) -> None:
    actual = evaluate(str(small_model), eval_source=str(small_text), seq_len=64, windows=3, device="cpu")
    assert actual["protocol"]["rule"] == "whole"
    assert actual["perplexity"] > 1 and actual["total_bytes"] == (small_model / "model.safetensors").stat().st_size


def test_scores_survive_the_disk(tmp_path: Path, windows: Windows) -> None:
    scores = Scores((1.5, 2.5), (0.1, 0.2), (1.0, 0.5))
    save_scores(tmp_path / "a.json", scores, windows.protocol, {"evaluation_seconds": 1.0})
    actual = load_scores(tmp_path / "a.json")
    assert actual is not None and actual[0] == scores and actual[1]["evaluation_seconds"] == 1.0
    assert load_scores(tmp_path / "b.json") is None
    (tmp_path / "b.json").write_text('{"nll": [1.0]}')
    with pytest.raises(InputError, match=r"not a measurement of this program .* delete it and run again"):
        load_scores(tmp_path / "b.json")


def test_a_perplexity_beyond_numbers_is_infinite() -> None:
    assert Scores((800.0,), None, None).perplexity == math.inf


def test_protocols_have_keys_of_their_own(windows: Windows) -> None:
    assert len(perplexity.protocol_key(windows)) == 8
    others = [Windows(windows.ids, None, windows.protocol | change) for change in ({"seq_len": 1}, {"bos": "x"}, {"fingerprint": "y"})]
    assert len({perplexity.protocol_key(w) for w in [windows, *others]}) == 4
