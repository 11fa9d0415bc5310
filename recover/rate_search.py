"""The search for a learning rate: short runs from the same start on the same text, each with its own warm-up and decay, judged on held-out text.

Beginning at the method's default it goes down by halves while that helps, or else up by doubles; the run that follows is, bit for bit, the one
that had the rate found written into its settings. Knows factors and losses; not models: the training loop makes the tries.
"""

from collections.abc import Sequence

TRY_SHARE = 10
"""Of the run's steps, a try takes one in so many."""
LEAST_TRY_STEPS = 8
LOWEST, HIGHEST = 1 / 16, 4.0
"""Factors of the default beyond which nothing is tried."""
USUAL_TRIES = 3
"""The default, and what is a half and the double of it: as many as there are where the default is right."""

Tried = tuple[float, float]
"""A factor of the default rates, and the held-out loss at the end of its try: infinite where training broke down."""


def try_steps(steps: int) -> int:
    """Steps of one try in a run of `steps`."""
    return min(steps, max(LEAST_TRY_STEPS, steps // TRY_SHARE))


def next_factor(tried: Sequence[Tried]) -> float | None:
    """What to try behind these tries, in their order; None where the best has worse ones on both sides, or the end of the range on one."""
    if not tried:
        return 1.0
    factors, best = [factor for factor, _ in tried], found(tried)
    down, up = best / 2, best * 2
    if best <= 1.0 and down not in factors and down >= LOWEST:
        return down
    return up if best >= 1.0 and up not in factors and up <= HIGHEST else None


def found(tried: Sequence[Tried]) -> float:
    """The factor with the lowest loss; the smaller of two that are alike, the lowest where all broke down."""
    return min(tried, key=lambda pair: (pair[1], pair[0]))[0] if tried else 1.0
