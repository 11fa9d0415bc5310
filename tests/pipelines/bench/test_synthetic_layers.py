"""Synthetic layers: a size gives the same layer every time, memory counts what a row takes, the exact step equals the published route."""

from collections.abc import Callable

import pytest
import torch
from bitmend.pipelines.bench import solvers, synthetic_layers


def test_a_size_gives_the_same_layer_every_time() -> None:
    needs = frozenset({"second_moment", "cross_moment", "fisher", "absmax"})
    (first, known), (second, again) = (synthetic_layers.synthetic_layer(64, needs, torch.device("cpu")) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(known.inputs.second_moment_II, again.inputs.second_moment_II)
    assert known.fisher is not None
    spectrum = torch.linalg.eigvalsh(known.inputs.second_moment_II.double())
    assert spectrum[0] > 0
    assert spectrum[-1] > 50 * spectrum.median()


def test_memory_of_a_row_is_what_it_takes_beyond_what_was_there() -> None:
    def solve() -> None:
        torch.ones(6_000_000).mul_(2)

    for _ in range(2):
        seconds, peak_bytes = synthetic_layers.measured(solve, 2, torch.device("cpu"))
        assert len(seconds) == 2
        assert 23e6 < peak_bytes < 40e6


def test_the_exact_step_errs_as_the_square_root_does() -> None:
    weight_OI, known = synthetic_layers.synthetic_layer(128, frozenset({"second_moment"}), torch.device("cpu"))

    def measured(solve: Callable[[], None]) -> tuple[list[float], int]:
        return synthetic_layers.measured(solve, 1, torch.device("cpu"))

    ours, theirs = solvers.exact_steps(weight_OI, known.inputs.second_moment_II, measured, False)
    assert ours["relative_output_error"] == pytest.approx(theirs["relative_output_error"], rel=1e-5)
    assert abs(theirs["error_difference"]) < 1e-5 and theirs["times_slower"] == theirs["seconds"] / ours["seconds"] > 0
