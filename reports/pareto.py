"""Pareto-optimal points: those that no other point beats. Knows pairs of numbers; imports nothing heavy."""

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (smaller is better), by rising first coordinate."""
    best, front = math.inf, []
    for index in sorted(range(len(points)), key=lambda index: points[index]):
        if points[index][1] < best:
            best = points[index][1]
            front.append(index)
    return front
