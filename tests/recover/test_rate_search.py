import json
import math

import pytest
import torch
from bitmend.recover.rate_search import HIGHEST, LOWEST, found, next_factor, try_steps
from bitmend.recover.recovery_methods import RECOVER
from bitmend.recover.train import Hooks, TrainingDiverged, TrainingText, train
from bitmend.recover.trainable import RATES

from .conftest import batch, held_out, llama
from .test_train import start, teacher, values


def searched(loss):
    tried = []
    while (factor := next_factor(tried)) is not None:
        tried.append((factor, loss(factor)))
    return [factor for factor, _ in tried], found(tried)


@pytest.mark.parametrize(
    ("best", "factors"),
    [
        (1.0, [1.0, 0.5, 2.0]),
        (0.5, [1.0, 0.5, 0.25]),
        (0.125, [1.0, 0.5, 0.25, 0.125, 0.0625]),
        (2.0, [1.0, 0.5, 2.0, 4.0]),
        (LOWEST / 4, [1.0, 0.5, 0.25, 0.125, 0.0625]),
        (HIGHEST * 4, [1.0, 0.5, 2.0, 4.0]),
    ],
)
def test_the_search_ends_beside_the_lowest_loss(best, factors):
    assert searched(lambda factor: abs(math.log2(factor / best))) == (factors, min(max(best, LOWEST), HIGHEST))


def test_of_two_that_are_alike_the_smaller_and_of_none_that_held_the_lowest():
    assert searched(lambda factor: 0.0 if factor < 1.1 else 1.0)[1] == LOWEST
    assert searched(lambda factor: math.inf) == ([1.0, 0.5, 0.25, 0.125, 0.0625], LOWEST)
    assert searched(lambda factor: math.inf if factor > 0.3 else factor)[1] == LOWEST
    assert found([]) == 1.0


def test_a_try_is_a_tenth_of_the_run_and_no_longer_than_it():
    assert [try_steps(steps) for steps in (3, 40, 200)] == [3, 8, 20]


def trained(rate, unit=1.0, **hooks):
    model, attached, config = start("scales", "3-bit", learning_rate=rate, loss="distill", steps=16, eval_every=4, warmup=0, accumulation=2)
    for trainable in attached.trainables.values():
        trainable.unit = unit
    resume = hooks.pop("resume", None)
    text = TrainingText(batch, held_out(), teacher(llama()))
    return train(model, attached, text, config, main="scales", resume=resume, hooks=Hooks(**hooks)), values(attached)


@pytest.fixture(scope="module")
def whole():
    """A search that nothing stopped: its result, the values at its end, and what was heard of it."""
    heard = []
    return *trained("search", unit=160.0, tried=lambda *news: heard.append(news)), heard


def test_the_run_behind_the_search_is_the_one_with_its_rate_written_down(whole):
    result, ends, heard = whole
    assert heard == result.tried and found(result.tried) < 1.0, "160 times the default rate is too much"
    written, same = trained(4e-3 * found(result.tried), unit=160.0)
    assert result.history == written.history and written.tried == [] and result.tokens == written.tokens
    assert all(torch.equal(value, same[name]) for name, value in ends.items())
    with pytest.raises(TrainingDiverged):
        trained(None, unit=160.0)


@pytest.mark.parametrize("name", ["diff_pruning", "lota", "prompt_tuning", "lr_qat"])
def test_a_try_leaves_nothing_behind_of_gates_flips_virtual_tokens_and_codes(name):
    ends, rate = {}, "search"
    for way in ("searched", "written"):
        model, attached, config = start(name, "3-bit", steps=3, learning_rate=rate)
        result = train(model, attached, TrainingText(batch, held_out()), config, main=RECOVER[name].main)
        rate = RATES[RECOVER[name].main] * found(result.tried)
        ends[way] = (result.history, values(attached))
    (history, actual), (expected_history, expected) = ends.values()
    assert history == expected_history and all(torch.equal(value, expected[key]) for key, value in actual.items())


@pytest.mark.parametrize("asked", [3, 8, 12, 24, 36])
def test_a_search_that_was_stopped_goes_on_to_the_bit(asked, whole):
    """Within the first try, between two, within a later one, and in the run itself; what was tried is not tried again."""
    expected, ends, _ = whole
    saved, calls, heard = [], iter(range(1000)), []
    stopped, _ = trained("search", unit=160.0, save=saved.append, save_every=5, stop=lambda: next(calls) == asked)
    assert not stopped.finished and all(json.dumps(state.meta) for state in saved)
    state = saved[-1] if saved else None
    again, same = trained("search", unit=160.0, resume=state, tried=lambda *news: heard.append(news))
    assert len(heard) + (len(state.meta["tried"]) if state else 0) == len(expected.tried)
    assert (again.history, [tuple(t) for t in again.tried], again.best_loss) == (expected.history, expected.tried, expected.best_loss)
    assert all(torch.equal(value, same[name]) for name, value in ends.items())


def test_where_training_breaks_down_at_every_rate_it_is_said_and_the_start_is_back():
    heard = []
    with pytest.raises(TrainingDiverged, match="a scale went to"):
        trained("search", unit=1e6, tried=lambda *news: heard.append(news))
    assert heard == [(factor, math.inf) for factor in (1.0, 0.5, 0.25, 0.125, LOWEST)]
