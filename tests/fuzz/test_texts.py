"""jsonl and parquet rows and plain text with anything in them: documents and windows, or one line."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from bitmend.pipelines.models.source import load_tokenizer
from bitmend.pipelines.text.data import load_text, tokenize
from hypothesis import strategies as st
from pyarrow import parquet

from .changes import changed, drawn
from .ending import counts, ending, fuzz

CORPUS = sorted((Path(__file__).parents[1] / "corpus" / "texts").iterdir())
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
WORDS = st.text(max_size=12) | st.sampled_from(
    ["", " ", "The river", "\ud800", "\x00", "<|endoftext|>", " = Title = \n", "é\u0301\u200d🏳", "{{ x }}"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | VALUES}, optional={"content": WORDS | VALUES})
MESSAGES = st.lists(MESSAGE | VALUES, max_size=4)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "text": WORDS | VALUES,
        "prompt": WORDS | MESSAGES,
        "completion": WORDS | MESSAGES,
        "messages": MESSAGES | VALUES,
        "id": VALUES,
    },
)
ROWS = st.lists(ROW | VALUES, max_size=5)
BYTES = st.binary(max_size=60)
COLUMNS = st.sampled_from(["text", "prompt", "completion", "messages", "id"])


@pytest.fixture(scope="module")
def tokenizer(small_model: Path) -> Any:
    actual = load_tokenizer(small_model)
    actual.chat_template = TEMPLATE
    return actual


def read(file: Path, tokenizer: Any) -> None:
    tokenize(load_text(str(file), "train", roles=("train", "evaluation"), tokenizer=tokenizer), tokenizer, 8)


def lines(rows: list[Any]) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


@counts(150, 20_000)
def test_jsonl(count: int, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    broken = st.tuples(ROWS.map(lines), BYTES, st.floats(0, 1)).map(
        lambda d: d[0][: int(d[2] * len(d[0]))] + d[1] + d[0][int(d[2] * len(d[0])) :]
    )
    codes = fuzz(count, count > 1000, ROWS.map(lines) | broken, lambda data: (file.write_bytes(data), read(file, tokenizer)))
    assert codes[3] > 0


@counts(100, 5000)
@pytest.mark.parametrize("ending_", [".txt", ".md"])
def test_plain_text(ending_: str, count: int, tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / f"t{ending_}"
    data = st.lists(BYTES | WORDS.map(lambda text: text.encode("utf-8", "surrogatepass")), max_size=6).map(b"\n".join)
    assert fuzz(count, count > 1000, data, lambda actual: (file.write_bytes(actual), read(file, tokenizer)))[3] > 0


def table(columns: dict[str, list[Any]]) -> bytes:
    """A parquet file; b"" for columns that pyarrow finds no type for."""
    sink = io.BytesIO()
    try:
        parquet.write_table(pyarrow.table(columns), sink)
    except (pyarrow.ArrowException, UnicodeError, OverflowError):
        return b""
    return sink.getvalue()


@counts(100, 10_000)
def test_parquet(count: int, tokenizer: Any, tmp_path: Path) -> None:
    """Columns of any type, and files with changed bytes."""
    file = tmp_path / "t.parquet"
    kinds = [
        WORDS,
        st.none() | WORDS,
        st.integers(-5, 5),
        BYTES,
        st.lists(WORDS, max_size=2),
        st.datetimes(),
        st.decimals(-9, 9, places=2),
        MESSAGES,
    ]
    column = st.integers(0, 4).flatmap(
        lambda n: st.dictionaries(COLUMNS, st.one_of([st.lists(k, min_size=n, max_size=n) for k in kinds]), min_size=1)
    )
    valid = {"t.parquet": table({"text": ["The river is wide.", "A stone lies near the bridge, and nobody saw it."]})}
    damaged = drawn(valid).map(lambda actual: changed(valid, actual)["t.parquet"])
    codes = fuzz(count, count > 1000, column.map(table) | damaged, lambda data: (file.write_bytes(data), read(file, tokenizer)))
    assert codes[3] > 0


@pytest.mark.parametrize("file", CORPUS, ids=lambda file: file.name)
def test_corpus(file: Path, tokenizer: Any) -> None:
    assert ending(lambda: read(file, tokenizer)) == 3
