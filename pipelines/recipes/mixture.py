"""Several sources of text with weights, written `wiki=0.5,code.jsonl=0.3,self=0.2`. Knows the notation; not what a source holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SELF = "self"
"""The source of what the dense model writes itself."""
NAMED = frozenset({"demo", "wiki", "news", "code", "docs", SELF})
"""Texts that a name stands for (`demo/texts` has them): a file or folder of that name is written ./docs."""


@dataclass(frozen=True)
class Share:
    source: str
    weight: float

    def __str__(self) -> str:
        return f"{self.source}={self.weight:g}"


def parse_mixture(text: str) -> tuple[Share, ...]:
    """The sources of `text` with their weights; one source alone has all of it. ValueError where weights are missing, not positive or do not
    add up to 1, or a source stands there twice."""
    if Path(text).expanduser().exists() or not ("=" in text or "," in text):
        return (Share(text, 1.0),)
    result = tuple(_share(item, text) for item in text.split(","))
    names = [share.source for share in result]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} stands twice in {text!r}; give each source one weight")
    total = math.fsum(share.weight for share in result)
    if abs(total - 1) > 1e-6:
        raise ValueError(f"the weights of {text!r} add up to {total:g}, not to 1")
    return result


def _share(item: str, text: str) -> Share:
    source, equals, weight = (part.strip() for part in item.rpartition("="))
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not equals or not source or not (0 < number <= 1):
        raise ValueError(
            f"{item.strip()!r} in {text!r}: expected SOURCE=WEIGHT with a weight above 0, as in wiki=0.5,code.jsonl=0.3,self=0.2"
        )
    return Share(source, number)


def with_sources(text: str, change: Callable[[str], str]) -> str:
    """`text` with `change` applied to every source in it."""
    result = parse_mixture(text)
    if len(result) == 1 and result[0].source == text:
        return change(text)
    return ",".join(str(Share(change(share.source), share.weight)) for share in result)
