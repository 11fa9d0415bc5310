"""Published tables and resumable rows: nothing lost, nothing measured twice, nothing mixed."""

import json
import math
from pathlib import Path

import pytest
from bitmend.reports import published
from bitmend.reports.plots import pareto_figure
from bitmend.reports.record import Protocol
from hypothesis import given, settings
from hypothesis import strategies as st

ROWS = [
    {"method": "gptq", "bits": 3, "perplexity": 43.4021, "total_bytes": 101_204_992, "seconds": 183.42},
    {"method": "rtn | plain", "bits": 3, "perplexity": math.inf, "total_bytes": 101_204_992, "seconds": 2.0},
]
COLUMNS = ["method", "bits", "perplexity", ("total_bytes", "size"), ("seconds", "time", "seconds")]


def test_write_makes_json_with_every_digit_and_a_readable_table(tmp_path: Path) -> None:
    figure = pareto_figure(ROWS)
    protocol = Protocol("wikitext2", "test", seq_len=512, windows=40)
    paths = published.write("compress", ROWS, COLUMNS, protocol, figure, title="Compression", notes=["rtn diverged"], directory=tmp_path)
    assert [path.name for path in paths] == ["compress.json", "compress.md", "compress.png", "compress.svg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in paths)
    data = published.read("compress", tmp_path)
    assert data["rows"][0] == ROWS[0] and data["rows"][1]["perplexity"] is None
    assert data["protocol"]["seq_len"] == 512 and data["notes"] == ["rtn diverged"]
    text = paths[1].read_text()
    assert "| gptq | 3 | 43.40 | 101.2 MB | 3.1 min |" in text and "| rtn \\| plain | 3 | – |" in text
    assert "![Compression](compress.png)" in text and "- rtn diverged" in text and "| seq_len | 512 |" in text
    assert paths[2].read_bytes().startswith(b"\x89PNG") and "<svg" in paths[3].read_text()


def test_write_without_figure_or_protocol(tmp_path: Path) -> None:
    paths = published.write("grid", ROWS[:1], ["method"], directory=tmp_path / "new")
    assert [path.name for path in paths] == ["grid.json", "grid.md"]
    assert "Protocol" not in paths[1].read_text() and "![" not in paths[1].read_text()
    with pytest.raises(ValueError, match=r"'method': unknown format 'kilo'"):
        published.write("grid", ROWS, [("method", "m", "kilo")], directory=tmp_path)


def test_rows_continue_where_they_were_stopped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    wanted = [{"method": name, "bits": bits} for name in ("rtn", "gptq") for bits in (2, 3)]
    rows = published.PublishedRows(path, ["method", "bits"], {"seq_len": 512})
    rows.append({**wanted[0], "perplexity": 130.25})
    rows.append({**wanted[2], "perplexity": math.nan})
    again = published.PublishedRows(path, ["method", "bits"], {"seq_len": 512})
    assert again.missing(wanted) == [wanted[1], wanted[3]]
    assert again.get(method="rtn", bits=2) == {**wanted[0], "perplexity": 130.25}
    assert again.get(method="gptq", bits=2) == {**wanted[2], "perplexity": None}
    assert wanted[0] in again and wanted[1] not in again and len(again) == 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 400))
def test_a_file_cut_anywhere_keeps_its_whole_rows_and_takes_new_ones(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = published.PublishedRows(path, ["n"], {"text": "é"})
    for n in range(5):
        rows.append({"n": n, "name": "ü" * n})
    whole = path.read_bytes()
    kept = whole[: min(cut, len(whole))]
    path.write_bytes(kept)
    again = published.PublishedRows(path, ["n"], {"text": "é"})
    assert [row["n"] for row in again] == list(range(max(0, kept.count(b"\n") - 1)))
    for identity in again.missing([{"n": n} for n in range(5)]):
        again.append({**identity, "name": "ü" * identity["n"]})
    assert path.read_bytes() == whole
    assert list(published.PublishedRows(path, ["n"], {"text": "é"})) == list(rows)


def test_a_row_measured_again_replaces_the_old_one(tmp_path: Path) -> None:
    rows = published.PublishedRows(tmp_path / "r.jsonl", ["n"])
    rows.append({"n": 1, "v": 1})
    rows.append({"n": 1, "v": 2})
    assert [row["v"] for row in published.PublishedRows(tmp_path / "r.jsonl", ["n"])] == [2]


@pytest.mark.parametrize(
    "keys, context, named",
    [(["n"], {"seq_len": 256}, "seq_len was 512 and is 256"), (["m"], {"seq_len": 512}, "identified by n instead of m")],
)
def test_rows_of_another_context_are_refused(tmp_path: Path, keys: list[str], context: dict, named: str) -> None:
    path = tmp_path / "r.jsonl"
    published.PublishedRows(path, ["n"], {"seq_len": 512}).append({"n": 1})
    before = path.read_bytes()
    with pytest.raises(ValueError, match=named):
        published.PublishedRows(path, keys, context)
    assert path.read_bytes() == before


def test_a_row_without_its_identity_and_a_foreign_file_are_refused(tmp_path: Path) -> None:
    rows = published.PublishedRows(tmp_path / "r.jsonl", ["method", "bits"])
    with pytest.raises(ValueError, match="'bits' is missing"):
        rows.append({"method": "rtn"})
    (tmp_path / "other.jsonl").write_text(json.dumps({"perplexity": 3}) + "\n")
    with pytest.raises(ValueError, match="no such file of rows"):
        published.PublishedRows(tmp_path / "other.jsonl", ["n"])
    (tmp_path / "old.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 0"):
        published.read("old", tmp_path)


def test_tables_lie_in_the_repository_and_not_next_to_the_links_of_an_editable_install() -> None:
    assert Path(__file__).parents[2] / "reports" / "published" == published.DIRECTORY
    assert {path.name for path in published.DIRECTORY.iterdir()} >= {"README.md", "plain.json", "demo.md", "demo.svg"}
