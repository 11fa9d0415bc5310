"""Words: they name the right stage and layers, call noise noise, and suggest what the settings leave open."""

import math
from dataclasses import replace

import pytest
from bitmend.reports.advice import suggestions
from bitmend.reports.findings import changes, findings, worst_role
from bitmend.reports.record import LayerRecord, RunRecord, StageRecord, derive


def run(*stages: StageRecord) -> RunRecord:
    return RunRecord("r", "m", stages=derive(stages))


def stage(name: str, perplexity: float, before: float | None = None, stderr: float | None = 0.004, **fields) -> StageRecord:
    moved = math.log(perplexity / before) if before else None
    return StageRecord(
        name, perplexity=perplexity, nll_difference_previous=moved, nll_difference_previous_stderr=stderr if before else None, **fields
    )


def sentence(record: RunRecord, kind: str) -> str:
    return " ".join(actual.text for actual in findings(record) if actual.kind == kind)


def test_the_stage_that_hurt_most_is_named_with_its_numbers() -> None:
    record = run(stage("baseline", 28.7), stage("prune", 30.0, 28.7, method="wanda"), stage("quantize", 43.4, 30.0, method="gptq"))
    text = sentence(record, "hurt")
    assert "quantize (gptq) hurt most: perplexity 30.00 → 43.40 (+44.7 %)" in text
    share = math.log(43.4 / 30.0) / math.log(43.4 / 28.7)
    assert f"{100 * share:.1f} % of all that was lost" in text and "± 0.0040 nats per token" in text


def test_a_change_within_two_standard_errors_is_noise_and_no_loss() -> None:
    record = run(stage("baseline", 20.0), stage("prune", 20.1, 20.0, stderr=0.003), stage("fuse", 20.1, 20.1, stderr=0.0))
    assert "No stage raised perplexity by more than two standard errors" in sentence(record, "hurt")
    assert "prune: perplexity 20.00 → 20.10 (+0.5 %) is within two standard errors" in sentence(record, "noise")
    clear = run(stage("baseline", 20.0), stage("prune", 20.1, 20.0, stderr=0.001))
    assert "prune hurt most" in sentence(clear, "hurt") and sentence(clear, "noise") == ""


@pytest.mark.parametrize("stderr", [None, 1e-7])
def test_a_change_that_no_digit_shows_is_neither_a_loss_nor_a_gain(stderr: float | None) -> None:
    """Of one window, or of so many that the error is tiny: 525.3 → 525.3 (+0.0 %) hurt nobody."""
    for after in (525.3 * math.exp(4e-5), 525.3 * math.exp(-4e-5)):
        record = run(stage("baseline", 525.3), stage("fuse", after, 525.3, stderr=stderr, method="bind"))
        assert sentence(record, "hurt") == "No stage raised perplexity by as much as 0.1 %." and sentence(record, "helped") == ""
        assert "0.0 %) is too little to count as a loss or a gain" in sentence(record, "noise")
    shown = run(stage("baseline", 525.3), stage("fuse", 526.0, 525.3, stderr=stderr, method="bind"))
    assert "fuse (bind) hurt most" in sentence(shown, "hurt")


def test_kernels_are_not_suspected_for_a_difference_within_noise() -> None:
    for stderr, advised in ((0.002, False), (0.0005, True)):
        tips = suggestions(run(stage("baseline", 20.0), stage("fuse", 20.04, 20.0, stderr=stderr)))
        assert any("check the kernels" in tip for tip in tips) == advised


def test_missing_standard_errors_are_admitted() -> None:
    record = run(stage("baseline", 20.0), StageRecord("prune", perplexity=30.0))
    assert "prune hurt most" in sentence(record, "hurt")
    assert "No paired standard error was recorded for prune" in sentence(record, "noise")


def test_a_noisy_gain_is_not_called_help() -> None:
    record = run(stage("baseline", 20.0), stage("quantize", 30.0, 20.0), stage("recover", 29.9, 30.0, stderr=0.01))
    assert sentence(record, "helped") == "" and "recover" in sentence(record, "noise")
    record = run(stage("baseline", 20.0), stage("quantize", 30.0, 20.0), stage("recover", 25.0, 30.0))
    closed = 1 - math.log(25 / 20) / math.log(30 / 20)
    assert f"recover helped: perplexity 30.00 → 25.00 (−16.7 %), {100 * closed:.1f} % of the log-perplexity gap" in sentence(record, "helped")


def test_a_perplexity_below_the_baseline_is_called_adaptation_only_when_it_is_clear() -> None:
    below = stage(
        "recover", 26.0, 30.0, top1_agreement=0.8, kl_to_baseline=0.16, nll_difference=math.log(26 / 28.7), nll_difference_stderr=0.01
    )
    record = run(stage("baseline", 28.7), stage("quantize", 30.0, 28.7), below)
    text = sentence(record, "adaptation")
    assert "recover is below the baseline (26.00 < 28.70)" in text and "no sign of a better model" in text
    assert "top-1 agreement 80.0 % and KL 0.1600 nats" in text
    blurred = replace(below, nll_difference_stderr=0.08)
    assert sentence(run(*record.stages[:2], blurred), "adaptation") == ""
    assert sentence(run(stage("baseline", 28.7), stage("quantize", 30.0, 28.7)), "adaptation") == ""


def heavy_down_proj(blocks: int = 10) -> tuple[LayerRecord, ...]:
    names = [(block, role) for block in range(blocks) for role in ("q_proj", "up_proj", "down_proj")]
    return tuple(
        LayerRecord(f"model.layers.{block}.x.{role}", (0.4 if role == "down_proj" else 0.1) + (0.5 if block == 0 else block * 1e-4))
        for block, role in names
    )


def test_the_worst_layers_type_and_blocks_are_named() -> None:
    record = run(stage("baseline", 20.0), stage("quantize", 30.0, 20.0, layers=heavy_down_proj()))
    text = sentence(record, "layers")
    assert text.startswith("Worst layers after quantize, by relative output error: model.layers.0.x.down_proj (0.900)")
    assert "By type down_proj is worst: 0.450 on average" in text
    even = tuple(LayerRecord(f"model.layers.{block}.x.{role}", 0.1) for block in range(9) for role in ("a", "b"))
    assert worst_role(even) is None
    first = tuple(LayerRecord(f"model.layers.{block}.x.{role}", 0.9 if block == 0 else 0.1) for block in range(12) for role in "abcd")
    assert "lies in block 0." in sentence(run(stage("baseline", 20.0), stage("quantize", 30.0, 20.0, layers=first)), "layers")


def test_allocation_says_how_far_the_prediction_was_off() -> None:
    layers = tuple(LayerRecord(f"m.{i}.q", metrics={"predicted_loss": 2.0, "measured_loss": 2.5}) for i in range(4))
    text = sentence(run(stage("baseline", 20.0), stage("decompose", 30.0, 20.0, layers=layers)), "allocation")
    assert "predicted loss 8.000, measured 10.00 (25.0 % off), over 4 layers" in text


def test_a_low_rank_term_dearer_than_a_bit_is_reported() -> None:
    stages = (stage("quantize", 30.0, 20.0, bits_per_weight=3.31), stage("decompose", 28.0, 30.0, bits_per_weight=4.78))
    assert "added 1.47 bits per weight" in sentence(run(stage("baseline", 20.0), *stages), "bytes")
    cheap = (stages[0], replace(stages[1], bits_per_weight=3.68))
    assert sentence(run(stage("baseline", 20.0), *cheap), "bytes") == ""


def test_notes_of_every_stage_are_repeated() -> None:
    record = run(stage("baseline", 20.0), stage("quantize", 30.0, 20.0, notes=("damping raised in q_proj",)))
    assert sentence(record, "note") == "quantize: damping raised in q_proj"
    twice = [stage(name, 30.0, 20.0, notes=("lm_head left alone",)) for name in ("prune", "quantize")]
    assert sentence(run(stage("baseline", 20.0), *twice), "note") == "prune, quantize: lm_head left alone"


def test_pruning_before_quantizing_is_reminded_of_its_mask() -> None:
    pruned = stage("prune", 30.0, 20.0, method="wanda", settings={"sparsity": 0.5})
    with_codes = suggestions(run(stage("baseline", 20.0), pruned, stage("quantize", 30.5, 30.0)))
    assert any("prune.method=none" in tip for tip in with_codes)
    assert not any("prune.method=none" in tip for tip in suggestions(run(stage("baseline", 20.0), pruned)))


@pytest.mark.parametrize(
    "name, method, settings, wanted, unwanted",
    [
        ("quantize", "rtn", {"bits": 3, "group_size": 128}, ["quantize.method=gptq", "quantize.group_size=32", "quantize.bits=4"], []),
        ("quantize", "gptq", {"bits": 4, "group_size": 32}, [], ["method=gptq", "group_size", "bits"]),
        ("quantize.2", "nf4", {"bits": 2}, ["quantize.2.method=gptq", "quantize.2.bits=3"], []),
        ("prune", "magnitude", {"sparsity": 0.5, "pattern": "unstructured"}, ["prune.method=wanda", "prune.sparsity=0.4"], ["4:8"]),
        ("prune", "wanda", {"sparsity": 0.5, "pattern": "2:4"}, ["prune.pattern=4:8", "prune.method=sparsegpt"], ["sparsity="]),
        ("decompose", "loftq", {}, ["decompose.method=qera_exact"], []),
        ("recover", "lora", {}, ["recover.learning_rate"], []),
        ("fuse", None, {}, ["fuse.backend=reference", "pipeline doctor"], []),
    ],
)
def test_advice_fits_the_stage_that_hurt(name: str, method: str | None, settings: dict, wanted: list[str], unwanted: list[str]) -> None:
    record = run(stage("baseline", 20.0), stage(name, 30.0, 20.0, method=method, settings=settings))
    text = " ".join(suggestions(record))
    assert [part for part in wanted if part not in text] == []
    assert [part for part in unwanted if part in text.split("`recover`")[0]] == []


def test_more_recovery_is_advised_only_while_a_gap_is_left() -> None:
    quantized = stage("quantize", 30.0, 20.0, method="gptq", settings={"bits": 4, "group_size": 32})
    left = run(stage("baseline", 20.0), quantized, stage("recover", 25.0, 30.0, method="lora", settings={"steps": 48}))
    assert any("recover.steps=96" in tip for tip in suggestions(left))
    done = run(stage("baseline", 20.0), quantized, stage("recover", 20.1, 30.0, method="lora", settings={"steps": 48}))
    assert not any("recover" in tip for tip in suggestions(done))
    assert any("`recover` stage" in tip for tip in suggestions(run(stage("baseline", 20.0), quantized)))


@pytest.mark.parametrize(("restored", "rate", "advised"), [(2, None, True), (0, None, False), (2, "search", False)])
def test_a_search_for_the_rate_is_advised_where_training_went_back(restored: int, rate: object, advised: bool) -> None:
    metrics = {"times_restored": restored} if restored else {}
    recovered = stage("recover", 28.0, 33.0, method="scales", settings={"steps": 24, "learning_rate": rate}, metrics=metrics)
    tips = suggestions(run(stage("baseline", 20.0), stage("quantize", 33.0, 20.0, method="gptq"), recovered))
    assert any("recover.learning_rate=search" in tip for tip in tips) == advised


@pytest.mark.parametrize(("scales", "advised"), [(False, True), ("auto", False), (True, False)])
def test_scales_that_train_already_are_not_advised(scales: object, advised: bool) -> None:
    recovered = stage("recover", 28.0, 33.0, method="lora", settings={"steps": 24, "scales": scales})
    tips = suggestions(run(stage("baseline", 20.0), stage("quantize", 33.0, 20.0, method="gptq"), recovered))
    assert any("recover.method=scales" in tip for tip in tips) == advised


@pytest.mark.parametrize(("loss", "advised"), [("distill", True), ("both", False), ("cross_entropy", False)])
def test_cross_entropy_is_advised_where_only_the_teacher_was_distilled(loss: str, advised: bool) -> None:
    recovered = stage("recover", 28.0, 33.0, method="scales", settings={"steps": 24, "loss": loss})
    tips = suggestions(run(stage("baseline", 20.0), stage("quantize", 33.0, 20.0, method="gptq"), recovered))
    assert any("recover.loss=both" in tip for tip in tips) == advised


def test_changes_skip_stages_without_a_perplexity() -> None:
    actual = changes(run(stage("baseline", 20.0), StageRecord("prune"), StageRecord("quantize", perplexity=30.0)).stages)
    assert [(change.before.stage, change.after.stage) for change in actual] == [("baseline", "quantize")]
    assert actual[0].nats == pytest.approx(math.log(1.5)) and not actual[0].is_noise


def test_what_a_budget_was_spent_on() -> None:
    layers = tuple(
        LayerRecord(f"m.{place}.q", rank=8 * (place > 2), metrics={"bits": bits, "predicted_loss": 1.0, "measured_loss": 1.1})
        for place, bits in enumerate((2, 3, 3, 3, 4))
    )
    facts = {"budget": "3.0bpw", "stored": "2.998bpw", "weighting": "fisher", "total_loss": 0.0712}
    stages = [
        stage("baseline", 20.0),
        stage("prune", 21.0, 20.0, nll_difference=0.05),
        stage("quantize", 22.0, 21.0, nll_difference=0.12, metrics={"allocation": facts}, layers=layers),
        stage("decompose", 21.9, 22.0, nll_difference=0.11, metrics={"allocation": facts}, layers=layers, method="qera_exact"),
    ]
    text = sentence(run(*stages), "allocation")
    assert "The budget 3.0bpw was spent by decompose (qera_exact), 2.998bpw at the end of the run" in text
    assert "1 matrices have 2 bits, 3 matrices have 3 bits, 1 matrices have 4 bits; 2 have a low-rank term, of rank 8 to 8" in text
    assert (
        "Against the baseline it was predicted to cost 0.0712 nats per token, to second order; on the evaluation text it cost 0.11" in text
    )
    assert "decompose (qera_exact): predicted loss 5.000, measured 5.500 (10.0 % off), over 5 layers" in text
    assert "budget" not in sentence(run(*stages[:2]), "allocation")


def test_of_an_imitation_the_divergence_comes_first() -> None:
    measured = {"kl_to_baseline": 0.0712, "top1_agreement": 0.861}
    for loss, first in (("distill", "KL to it 0.07120 nats per token, the same first choice for 86.1 % of the tokens; perplexity"), ("both", "perplexity")):
        taught = stage("recover", 21.0, 24.0, method="scales", settings={"loss": loss})
        record = run(stage("baseline", 20.0), stage("quantize", 24.0, 20.0), taught, stage("fuse", 21.0, 21.0, method="bind", **measured))
        assert sentence(record, "summary").startswith(f"From baseline to fuse (bind): {first} 20.00 → 21.00")
