import json
import math
from dataclasses import replace

import pytest
import torch
from bitmend.recover.compressed_model import compressed_linears, install
from bitmend.recover.recovery_methods import RECOVER, attach, config_of
from bitmend.recover.student import Batch, Teacher, student_of, whole_windows
from bitmend.recover.train import Hooks, TrainingDiverged, TrainingText, held_out_loss, train
from bitmend.recover.training_run import TrainConfig, learning_rate
from transformers import masking_utils

from .conftest import batch, compressed, gpt2, held_out, llama, records


def start(name="scales", kind="3-bit", seed=0, **settings):
    model = compressed(kind, seed=seed)
    config = {"steps": 8, "loss": "cross_entropy", "eval_every": 2, "warmup": 2} | settings
    attached = attach(name, model, config)
    return model, attached, config_of(name, config)


def teacher(model):
    dense = student_of(model.requires_grad_(False))
    return Teacher(lambda batch: dense.hidden(batch.ids), dense.logits)


def values(attached):
    return {name: t.parameter.detach().clone() for name, t in attached.trainables.items()}


def test_on_what_the_teacher_wrote_it_is_imitated_and_nothing_else():
    """Both losses on generated batches are distillation to the bit; with real ones between them they are not."""
    ways = {"both, generated": ("both", [True, True]), "distill": ("distill", [False, False]), "both, mixed": ("both", [True, False])}
    trained = {}
    for way, (loss, generated) in ways.items():
        model, attached, config = start("scales", "3-bit", steps=4, loss=loss)
        batches = lambda index, generated=generated: replace(batch(index), generated=generated[index % 2])  # noqa: E731
        result = train(model, attached, TrainingText(batches, held_out(), teacher(llama())), config)
        trained[way] = [row["loss"] for row in result.history if "loss" in row]
    assert trained["both, generated"] == trained["distill"]
    assert trained["both, mixed"][0] == trained["distill"][0] and trained["both, mixed"][1] != trained["distill"][1]


def test_the_held_out_loss_is_the_mean_over_kinds():
    student = student_of(llama().requires_grad_(False))
    ids = [batch(index).ids for index in range(4)]
    alone = [held_out_loss(student, [Batch(some)]) for some in ids]
    assert len(set(alone)) == 4
    assert held_out_loss(student, [Batch(some) for some in ids]) == pytest.approx(sum(alone) / 4)
    kinds = [Batch(some, kind=kind) for some, kind in zip(ids, "aaab", strict=True)]
    assert held_out_loss(student, kinds) == pytest.approx((sum(alone[:3]) / 3 + alone[3]) / 2)


def test_distillation_brings_the_student_to_the_teacher():
    dense = llama()
    model, attached, config = start("scales", "3-bit", steps=30, loss="distill", eval_every=10, learning_rate=2e-2)
    guide = teacher(dense)
    ids = batch(900).ids

    def divergence():
        with torch.no_grad():
            p, q = dense(ids).logits.log_softmax(-1), model(ids).logits.log_softmax(-1)
            return float((p.exp() * (p - q)).sum(-1).mean())

    before = divergence()
    seen = []
    result = train(model, attached, TrainingText(lambda i: batch(i % 2), [batch(800)], guide), config, main="scales", hooks=Hooks(progress=seen.append))
    losses = [h["loss"] for h in result.history if "loss" in h]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert result.best_step == 0 or divergence() < before
    assert [p.step for p in seen] == list(range(1, 31)) and seen[-1].seconds_left == 0 and seen[-1].tokens_per_second > 0


@pytest.mark.parametrize(("name", "kind"), [("scales", "3-bit"), ("lora", "lq"), ("full", "pruned"), ("perp", "2:4")])
def test_resume_is_bit_identical_at_any_step(name, kind):
    model, attached, config = start(name, kind, accumulation=2)
    states = {}
    whole = train(model, attached, TrainingText(batch, held_out()), config, hooks=Hooks(save=lambda s: states.setdefault(s.meta["step"], s), save_every=1))
    final = values(attached)
    for step in (1, 4, 7):
        state = states[step]
        json.dumps(state.meta)
        again, attached_again, _ = start(name, kind, accumulation=2)
        result = train(again, attached_again, TrainingText(batch, held_out()), config, resume=state)
        assert result.best_loss == whole.best_loss and result.history == whole.history
        for key, value in values(attached_again).items():
            assert torch.equal(value, final[key]), (step, key)


def test_stop_saves_and_a_resumed_run_ends_the_same():
    model, attached, config = start()
    saved = []
    calls = iter(range(100))
    stopped = train(model, attached, TrainingText(batch, held_out()), config, hooks=Hooks(save=saved.append, stop=lambda: next(calls) == 5))
    assert not stopped.finished and stopped.step == 5
    result = train(model, attached, TrainingText(batch, held_out()), config, resume=saved[-1])
    model2, attached2, _ = start()
    whole = train(model2, attached2, TrainingText(batch, held_out()), config)
    assert result.history == whole.history
    assert all(torch.equal(v, values(attached2)[k]) for k, v in values(attached).items())


def test_a_state_of_other_parameters_is_refused():
    model, attached, config = start()
    saved = []
    train(model, attached, TrainingText(batch, held_out()), config, hooks=Hooks(save=saved.append, save_every=4))
    other, attached_other, _ = start("bitfit")
    with pytest.raises(ValueError, match="other parameters"):
        train(other, attached_other, TrainingText(batch, held_out()), config, resume=saved[0])


def test_never_worse_than_it_began():
    """Training text that teaches the opposite of the held-out text: the start comes back, exactly."""
    model, attached, config = start("lora", "lq", learning_rate=0.3)
    began, loss = values(attached), held_out_loss(student_of(model), held_out())
    wrong = Batch(torch.full((2, 24), 5))
    result = train(model, attached, TrainingText(lambda i: wrong, held_out()), config, main="factors")
    assert result.best_step == 0 and not result.improved
    assert all(torch.equal(v, values(attached)[k]) for k, v in began.items())
    assert held_out_loss(student_of(model), held_out()) == loss == result.best_loss


TOO_FAST = {"steps": 24, "loss": "distill", "eval_every": 3, "learning_rate": 0.2, "warmup": 0}


def test_a_rate_too_high_is_halved_from_the_best_values():
    best = {}
    for way in ("continue", "restore"):
        model, attached, config = start("scales", "3-bit", when_worse=way, **TOO_FAST)
        result = train(model, attached, TrainingText(batch, held_out(), teacher(llama())), config, main="scales")
        best[way] = result.best_loss
        assert bool(result.restored) == (way == "restore")
    assert best["restore"] < best["continue"]
    assert result.restored[0].startswith("step 9: held-out loss ") and result.restored[0].endswith(" at step 6")


def test_a_run_that_went_back_is_resumed_to_the_bit():
    text = TrainingText(batch, held_out(), teacher(llama()))
    model, attached, config = start("scales", "3-bit", when_worse="restore", **TOO_FAST)
    states = {}
    whole = train(model, attached, text, config, main="scales", hooks=Hooks(save=lambda s: states.setdefault(s.meta["step"], s), save_every=1))
    assert len(whole.restored) > 1
    for step in (2, 3, 10):
        json.dumps(states[step].meta)
        again, attached_again, _ = start("scales", "3-bit", when_worse="restore", **TOO_FAST)
        result = train(again, attached_again, text, config, main="scales", resume=states[step])
        assert (result.history, result.restored, result.best_loss) == (whole.history, whole.restored, whole.best_loss)
        assert all(torch.equal(v, values(attached)[k]) for k, v in values(attached_again).items())


def poisoned(bad_calls):
    """A student whose hidden states become NaN at the given training calls."""
    calls = iter(range(10_000))

    def make(student):
        def hidden(ids):
            states = student.hidden(ids)
            if torch.is_grad_enabled() and next(calls) in bad_calls:
                states = states * math.nan
            return states

        return type(student)(hidden, student.logits, student.head_parameters)

    return make


def test_nan_rolls_back_once_and_goes_on_with_a_smaller_rate():
    model, attached, config = start()
    result = train(model, attached, TrainingText(batch, held_out()), config, student=poisoned({4})(student_of(model)))
    assert result.finished and len(result.rollbacks) == 1 and "step 5" in result.rollbacks[0]
    assert result.best_loss <= result.start_loss


def test_nan_twice_stops_with_the_best_values_in_place():
    model, attached, config = start()
    with pytest.raises(TrainingDiverged, match="rolling back once"):
        train(model, attached, TrainingText(batch, held_out()), config, student=poisoned({2, 5})(student_of(model)))
    assert all(bool(torch.isfinite(v).all()) for v in values(attached).values())
    assert math.isfinite(held_out_loss(student_of(model), held_out()))


@pytest.mark.parametrize("bad", [set(), {4}, {2, 5}])
def test_when_steps_are_read_is_of_no_consequence(bad: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step, or only where the values are judged, saved or stopped at."""
    seen = []
    for every_step in (True, False):
        monkeypatch.setattr("bitmend.recover.train.overdue", lambda *_, now=every_step: now)
        model, attached, config = start("scales", "3-bit")
        student, saved, said = poisoned(bad)(student_of(model)), [], ""
        try:
            result = train(model, attached, TrainingText(batch, held_out()), config, student=student, hooks=Hooks(save=saved.append, save_every=3))
            said = f"{result.history} {result.rollbacks} {result.tokens} {result.best_step}"
        except TrainingDiverged as error:
            said = str(error)
        seen.append((said, [state.meta for state in saved], values(attached)))
    assert seen[0][:2] == seen[1][:2]
    assert all(torch.equal(value, seen[1][2][name]) for name, value in seen[0][2].items())


def test_a_scale_that_leaves_the_positive_numbers_is_named():
    model, attached, config = start("scales", learning_rate=20.0, warmup=0)
    with pytest.raises(TrainingDiverged, match=r"scales: (a scale went to -|scales run)"):
        train(model, attached, TrainingText(batch, held_out()), config, main="scales")


def test_a_row_is_one_text_and_transformers_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, asked = llama(), batch(0).ids, []
    student = student_of(model)  # which runs the whole model once
    plain = model.base_model(input_ids=ids, use_cache=False)[0]
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: asked.append(position_ids))
    assert torch.equal(student.hidden(ids), plain) and not asked
    model.base_model(input_ids=ids, use_cache=False)
    assert len(asked) == 1, "outside it asks as ever"
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    with whole_windows():
        assert not hasattr(masking_utils, "find_packed_sequence_indices")


def test_gradient_checkpointing_changes_nothing():
    results = []
    for checkpointing in (False, True):
        model, attached, config = start("lora", "3-bit", gradient_checkpointing=checkpointing)
        results.append((train(model, attached, TrainingText(batch, held_out()), config).history, values(attached)))
        assert "forward" not in vars(model.model.layers[0])
    assert results[0][0] == results[1][0]
    assert all(torch.equal(v, results[1][1][k]) for k, v in results[0][1].items())


def test_the_loss_mask_decides_what_counts():
    model, attached, config = start(steps=1)
    ids = batch(0).ids
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 10:] = True
    losses = []
    for b in (Batch(ids, mask), Batch(ids[:, :], None)):
        m, a, c = start(steps=1)
        losses.append(train(m, a, TrainingText(lambda i, b=b: b, held_out()), c).history[1]["loss"])
    with torch.no_grad():
        logits = start()[0](ids).logits[:, 9:-1]
    truth = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 10:].reshape(-1))
    assert losses[0] == pytest.approx(float(truth), abs=1e-5) and losses[0] != losses[1]
    with pytest.raises(ValueError, match="without a single token"):
        train(model, attached, TrainingText(lambda i: Batch(ids, mask & False), held_out()), config)


def test_schedule_warms_up_and_falls_to_zero():
    config = TrainConfig(steps=100, warmup=10)
    rates = [learning_rate(s, config) for s in range(100)]
    assert rates[0] < rates[5] < rates[10] == 1.0 and rates[10] > rates[50] > rates[99] > 0
    assert learning_rate(0, TrainConfig(steps=1)) == 1.0


def test_teacher_of_another_vocabulary_is_refused():
    model, attached, config = start(loss="distill")
    guide = teacher(gpt2())
    narrow = Teacher(guide.hidden, lambda h: guide.logits(h)[..., :-1])
    with pytest.raises(ValueError, match="vocabulary has 100 entries"):
        train(model, attached, TrainingText(batch, held_out(), narrow), config)
    with pytest.raises(ValueError, match="needs a teacher"):
        train(model, attached, TrainingText(batch, held_out()), config)


def test_every_method_has_a_rate_and_linears_are_found():
    from bitmend.recover.trainable import RATES

    assert all(row.main in RATES for row in RECOVER.values())
    assert len(compressed_linears(compressed("dense"))) == 14


@pytest.mark.parametrize("matmul", ["high", "medium"])
def test_coarser_products_train_the_updates_alone(matmul: str) -> None:
    """Within an update the precision is what was asked for; the teacher, the held-out loss and what comes after have float32."""
    seen: dict[str, set[str]] = {"student": set(), "teacher": set(), "held out": set()}
    model, attached, config = start(steps=4, matmul=matmul)
    student, told = (
        student_of(model),
        torch.randn(*batch(0).ids.shape, model.config.hidden_size, generator=torch.Generator().manual_seed(0)),
    )

    def hidden(ids: torch.Tensor) -> torch.Tensor:
        seen["student" if torch.is_grad_enabled() else "held out"].add(torch.get_float32_matmul_precision())
        return student.hidden(ids)

    def taught(_: Batch) -> torch.Tensor:
        seen["teacher"].add(torch.get_float32_matmul_precision())
        return told

    before = torch.get_float32_matmul_precision()
    config = replace(config, loss="distill")
    train(model, attached, TrainingText(batch, held_out(), Teacher(taught, student.logits)), config, student=replace(student, hidden=hidden))
    assert seen == {"student": {matmul}, "teacher": {"highest"}, "held out": {before}}
    assert torch.get_float32_matmul_precision() == before


def test_the_same_function_trains_the_same_whatever_the_gains_of_its_norms_are():
    """Gains that are c times as large before matrices that are 1/c as large: rates that were chosen on one model serve the other."""
    losses = {}
    for factor in (1.0, 0.125):
        dense = llama()
        with torch.no_grad():
            for block in dense.model.layers:
                for norm, readers in (
                    (block.input_layernorm, (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)),
                    (block.post_attention_layernorm, (block.mlp.gate_proj, block.mlp.up_proj)),
                ):
                    norm.weight.mul_(factor)
                    for linear in readers:
                        linear.weight.div_(factor)
        install(dense, records(dense, "3-bit"))
        config = {"steps": 12, "loss": "cross_entropy", "eval_every": 3, "warmup": 2, "clip": 0, "norms": True, "learning_rate": 2e-2}
        attached = attach("scales", dense, config)
        result = train(dense, attached, TrainingText(batch, held_out()), config_of("scales", config), main="scales")
        losses[factor] = torch.tensor([row["loss"] for row in result.history if "loss" in row])
        assert result.best_loss < result.start_loss - 0.01
    torch.testing.assert_close(losses[0.125], losses[1.0], rtol=1e-4, atol=0)
