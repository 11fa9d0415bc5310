"""Loads text from a source: the demo, a local file, a `datasets` id or directory.

Knows file formats, data set names and what a row holds. Does not know parts (only which official split a part lives in) or tokens.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..demo.texts import TEXTS
from ..errors import InputError, as_input_error
from .splits import PARTS, Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ALIASES = {"wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1", "wikitext103": "Salesforce/wikitext:wikitext-103-raw-v1"}
PLAIN_TEXT = (".txt", ".raw", ".md")
FILE_ENDINGS = (*PLAIN_TEXT, ".jsonl", ".parquet")
SPLITS_OF = {
    "evaluation": ("test", "validation", "valid", "dev", "eval"),
    "held_out": ("validation", "valid", "dev", "eval"),
    "calibration": ("train",),
    "train": ("train",),
}
SPLIT_NAMES = frozenset(name for names in SPLITS_OF.values() for name in names)
STREAM_ABOVE_BYTES = 4_000_000_000
MAXIMUM_CHARACTERS = 200_000_000
SEPARATOR = "<|endoftext|>"
PARAGRAPH = "\n\n"
_TITLE = re.compile(r"^ = [^=\n]+ = \s*$")
_TITLE_LINE = re.compile(r"(?m)^ = [^=\n]+ = $")


@dataclass(frozen=True)
class Body:
    """All text that one split of a source holds; `roles` are the parts that share it whatever the recipe sets, None: those it sets."""

    documents: list[Document]
    join: str
    dataset: str
    split: str
    roles: frozenset[str] | None = None


def read(source: str, part: str, tokenizer: Any = None) -> Body:
    """The text of `source` in which `part` lies. Raises InputError for what does not exist or cannot be understood."""
    if source in TEXTS:
        named = TEXTS[source]
        return Body([Document(text) for text in named.documents()], PARAGRAPH, named.dataset, "by document", frozenset(PARTS))
    path = Path(source).expanduser()
    if path.is_file() or path.suffix in FILE_ENDINGS:
        return _from_file(path, tokenizer)
    return _from_datasets(source, part, tokenizer)


def _from_file(path: Path, tokenizer: "PreTrainedTokenizerBase") -> Body:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix in PLAIN_TEXT:
        documents, join = _from_plain_text(_utf8(path), path)
    elif path.suffix == ".jsonl":
        documents, join = _from_rows(_json_lines(path), str(path), tokenizer)
    elif path.suffix == ".parquet":
        documents, join = _from_rows(_parquet_rows(path), str(path), tokenizer)
    else:
        raise InputError(f"{path}: unknown kind of text file '{path.suffix}'; give one of {', '.join(FILE_ENDINGS)}")
    return Body(documents, join, path.name, "file")


def _from_plain_text(text: str, path: Path) -> tuple[list[Document], str]:
    """One document, unless the file separates them by `<|endoftext|>` or by WikiText's ' = Title = ' lines (kept to the byte)."""
    if not text.strip():
        raise InputError(f"{path}: holds no text")
    if SEPARATOR in text:
        return [Document(piece.strip()) for piece in text.split(SEPARATOR) if piece.strip()], PARAGRAPH
    starts = [match.start() for match in _TITLE_LINE.finditer(text)]
    if len(starts) < 2:
        return [Document(text)], PARAGRAPH
    bounds = [0, *starts[1:], len(text)]
    return [Document(text[start:end]) for start, end in pairwise(bounds)], ""


def _utf8(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; convert it, e.g. iconv -f latin1 -t utf-8") from error


def _json_lines(path: Path) -> Iterator[dict[str, object]]:
    for number, line in enumerate(_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of too many digits; lists within lists without end
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise InputError(f"{path}: line {number} is not JSON ({reason})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}: line {number} holds a {type(row).__name__} instead of an object with a field 'text'")
        yield row


def _parquet_rows(path: Path) -> Iterator[dict[str, object]]:
    from pyarrow import parquet

    with as_input_error(f"{path}: not a readable parquet file"), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _from_datasets(source: str, part: str, tokenizer: "PreTrainedTokenizerBase") -> Body:
    """A data set's official split for the part; parts without one of their own share the train split."""
    name, config, wanted_split = _parse(ALIASES.get(source, source))
    splits, whole = _load(name, config, wanted_split)
    label = name if config is None else f"{name}:{config}"
    if wanted_split is not None:
        documents, join = _from_rows(_limited(splits[wanted_split], label), label, tokenizer)
        return Body(documents, join, label, wanted_split)
    home = {role: _home(role, whole, label) for role in PARTS}
    if home["held_out"] == home["evaluation"] and "train" in whole:
        home["held_out"] = "train"
    split = home[part]
    documents, join = _from_rows(_limited(splits[split], label), label, tokenizer)
    return Body(documents, join, label, split, frozenset(role for role in PARTS if home[role] == split))


def _parse(source: str) -> tuple[str, str | None, str | None]:
    """`id[:config][:split]`; a single suffix is a split when it reads like one (train, test[:10%], …)."""
    name, *rest = source.split(":", 1)
    if not rest:
        return name, None, None
    first, *second = re.split(r":(?![^\[]*\])", rest[0], maxsplit=1)
    if second:
        return name, first or None, second[0]
    if re.split(r"[\[+]", first)[0] in SPLIT_NAMES:
        return name, None, first
    return name, first, None


def _home(role: str, available: list[str], label: str) -> str:
    for split in (*SPLITS_OF[role], "train"):
        if split in available:
            return split
    if len(available) == 1:
        return available[0]
    raise InputError(f"{label}: no split for {role} among {', '.join(available)}; name one as {label}:SPLIT")


def _load(name: str, config: str | None, split: str | None) -> tuple[Any, list[str]]:
    """Splits by name. Large data sets are streamed. Every failure of the library becomes one line."""
    from datasets import load_dataset, load_dataset_builder

    try:
        size = load_dataset_builder(name, config).info.dataset_size or 0
        streaming = size > STREAM_ABOVE_BYTES
        if split is not None:
            return {split: load_dataset(name, config, split=split, streaming=streaming)}, [split]
        loaded = load_dataset(name, config, streaming=streaming)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())
        raise InputError(
            f"data '{name}'{f' ({config})' if config else ''}: not a local file, and the datasets library cannot load it ({reason[:300]}); "
            "use 'demo', a text (.txt, .raw, .md), .jsonl or .parquet file, or see that the id is right and the hub can be reached"
        ) from error
    return loaded, [str(result) for result in loaded]


def _limited(rows: Iterable[dict[str, Any]], label: str) -> Iterator[dict[str, Any]]:
    """Rows up to 200 M characters; more than any calibration or recovery here reads."""
    characters = 0
    for row in rows:
        yield row
        characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if characters > MAXIMUM_CHARACTERS:
            log.warning("%s: only its first %d characters are read", label, characters)
            return


def _from_rows(rows: Iterable[dict[str, Any]], name: str, tokenizer: Any) -> tuple[list[Document], str]:
    """Documents and their join from rows with `messages`, `prompt` and `completion`, or `text`."""
    iterator = iter(rows)
    first = next(iterator, None)
    if first is None:
        raise InputError(f"{name}: holds no rows")
    if "messages" in first or ("prompt" in first and "completion" in first):
        from .conversations import render

        return [render(row, number, name, tokenizer) for number, row in enumerate(chain([first], iterator), start=1)], ""
    if "text" not in first:
        raise InputError(f"{name}: rows have {', '.join(first) or 'no fields'}; needed is 'text', 'prompt' and 'completion', or 'messages'")
    texts = []
    for number, row in enumerate(chain([first], iterator), start=1):
        text = row.get("text")
        if not isinstance(text, str):
            raise InputError(f"{name}: row {number} has {type(text).__name__} instead of a string as 'text'")
        texts.append(text.encode("utf-8", "replace").decode("utf-8"))
    return _grouped(texts, name), PARAGRAPH


def _grouped(texts: list[str], name: str) -> list[Document]:
    """A document a row; WikiText's rows are lines, grouped here into articles with empty rows kept, as the papers join them."""
    if not any(text.strip() for text in texts):
        raise InputError(f"{name}: holds no text")
    starts = [index for index, text in enumerate(texts) if _TITLE.match(text)]
    if not starts:
        return [Document(text) for text in texts if text.strip()]
    bounds = [0, *starts[1:], len(texts)]
    return [Document(PARAGRAPH.join(texts[start:end])) for start, end in pairwise(bounds)]
