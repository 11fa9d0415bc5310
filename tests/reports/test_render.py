"""Pages, Markdown and CSV: every number of a record is there, nothing is fetched, odd records are served."""

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from bitmend.reports import columns
from bitmend.reports.json_values import mappings, numbers
from bitmend.reports.record import LayerRecord, RunRecord, StageRecord
from bitmend.reports.render import render, show
from bitmend.reports.tables import fitted_table, layer_table, stage_table
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

VOID = {"meta", "link", "br", "img", "path", "use", "rect", "circle", "line", "image"}


class Reader(HTMLParser):
    """Collects tags, attributes, exact values and text; fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.values: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "data":
            self.values.update((dict(attrs)["value"] or "").split())
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def measured(stage: StageRecord) -> list[float]:
    """Every number of a stage and its layers but settings (which are text) and block indices (which are in the names)."""
    data = stage.to_json()
    data.pop("settings")
    layers = data["layers"]
    assert isinstance(layers, list)
    for layer in layers:
        assert isinstance(layer, dict)
        layer.pop("block")
    return [value for _, value in numbers(data)]


@pytest.fixture(scope="module")
def page(full_run: RunRecord) -> str:
    return render(full_run, "html")


def test_html_holds_every_number_exactly(full_run: RunRecord, page: str) -> None:
    values = read(page).values
    wanted = [repr(value) for stage in full_run.stages for value in measured(stage)]
    assert len(wanted) > 250
    assert [value for value in wanted if value not in values] == []


def test_html_refers_to_nothing_outside_itself_and_runs_nothing(page: str) -> None:
    reader = read(page)
    assert "://" not in page and "@import" not in page
    assert not {"script", "iframe", "object", "embed", "img"} & set(reader.tags)
    links = [value for name, value in reader.attributes if name in ("href", "src", "xlink:href", "data") and value]
    assert all(link.startswith(("#", "data:image/png;base64,")) or link == "data:," for link in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(\"?([^)\"]+)", page))


def test_html_ids_are_unique_and_every_reference_has_its_target(page: str) -> None:
    reader = read(page)
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {value[1:] for name, value in reader.attributes if name == "href" and value and value.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert used and used <= set(ids)


def test_html_draws_says_and_escapes(full_run: RunRecord, page: str) -> None:
    reader = read(page)
    text = " ".join(" ".join(reader.text).split())
    assert reader.tags.count("svg") == 6
    for wanted in (
        "Perplexity by stage",
        "Size against perplexity",
        "Where the error is",
        "quantize (gptq) hurt most",
        "What to try",
        "encyclopaedia",
    ):
        assert wanted in text
    assert "demo & <model>" in text and "<model>" not in page and "<of>" not in page
    assert {"viewport", "width=device-width, initial-scale=1"} <= {value for _, value in reader.attributes}
    assert "@media print" in page and "prefers-color-scheme: dark" in page


def test_plots_take_their_colours_from_the_page(page: str) -> None:
    svgs = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert all("var(--ink)" in svg and "var(--sans)" in svg and "#101827" not in svg and "DejaVu" not in svg for svg in svgs)


def test_markdown_holds_every_number_as_it_is_shown(full_run: RunRecord) -> None:
    text = render(full_run, "md")
    for stage in full_run.stages:
        for column in columns.stage_columns(full_run.stages):
            assert column.show(column.get(stage)) in text, column.key
        for layer in stage.layers:
            for column in columns.layer_columns(stage.layers):
                assert column.show(column.get(layer)) in text, column.key
    history = mappings(full_run.stages[4].metrics["history"])
    for column in columns.series_columns(history):
        assert all(f"| {column.show(column.get(row))} |" in text for row in history)
    for _, _, value in columns.extra_rows(full_run.stages):
        assert columns.exact(value) in text
    assert "hurt most" in text and "20,440" in text and all(note in text for stage in full_run.stages for note in stage.notes)


def test_every_format_says_what_the_further_texts_measured_and_on_what(full_run: RunRecord, page: str) -> None:
    last = full_run.stages[-1].texts["news"]
    assert last.perplexity_ratio == last.perplexity / full_run.stages[0].texts["news"].perplexity
    markdown, table = render(full_run, "md"), list(csv.DictReader(io.StringIO(render(full_run, "csv"))))
    for text in (markdown, " ".join(read(page).text)):
        assert "perplexity, news" in text and "Δ to baseline, code" in text and columns.number(last.perplexity) in text
        assert "news: papers test, 40 windows of 512 tokens" in text and "77aa" in text
    stage = next(row for row in table if row["kind"] == "stage" and row["stage"] == "fuse")
    assert stage["texts.news.perplexity"] == repr(last.perplexity) and stage["texts.code.protocol.dataset"] == "programs"
    assert RunRecord.from_json(json.loads(render(full_run, "json"))) == full_run


def test_markdown_tables_are_rectangular(full_run: RunRecord) -> None:
    for table in re.findall(r"(?:^\|.*\|\n)+", render(full_run, "md"), flags=re.M):
        assert len({re.sub(r"\\\|", "", line).count("|") for line in table.splitlines()}) == 1


def test_csv_holds_every_number_exactly_in_tidy_rows(full_run: RunRecord) -> None:
    rows = list(csv.DictReader(io.StringIO(render(full_run, "csv"))))
    assert len(rows) == 4 + len(full_run.stages) + sum(len(stage.layers) for stage in full_run.stages)
    for index, stage in enumerate(full_run.stages):
        mine = [row for row in rows if row["stage_index"] == str(index)]
        actual = {cell for row in mine for cell in row.values()}
        assert [value for value in measured(stage) if repr(value) not in actual] == []
        assert [row["layer"] for row in mine if row["kind"] == "layer"] == [layer.name for layer in stage.layers]
    assert rows[0]["protocol.tokens"] == "20440" and rows[0]["gap_closed"] == ""


def test_json_is_the_record(full_run: RunRecord) -> None:
    assert RunRecord.from_json(json.loads(render(full_run, "json"))) == full_run


def test_unknown_format_is_refused_with_the_known_ones(full_run: RunRecord) -> None:
    with pytest.raises(ValueError, match=r"'pdf'.*html, md, csv, json"):
        render(full_run, "pdf")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("format", ["html", "md", "csv", "json"])
@pytest.mark.parametrize(
    "stages",
    [
        (),
        (StageRecord("baseline"),),
        (StageRecord("baseline", perplexity=float("nan")), StageRecord("prune", perplexity=float("inf"), total_bytes=0)),
        (
            StageRecord("baseline", perplexity=20.0),
            StageRecord("prune", perplexity=20.0, layers=(LayerRecord("x", float("nan"), None, 0, 0.0),)),
        ),
        (StageRecord("baseline", perplexity=5.0, total_bytes=10), StageRecord("quantize", perplexity=1e30, total_bytes=1, sparsity=0.0)),
    ],
    ids=["none", "unmeasured", "not finite", "empty layer", "diverged"],
)
def test_odd_records_are_served_in_every_format(format: str, stages: tuple[StageRecord, ...]) -> None:
    text = render(RunRecord("r", "m", stages=stages), format)  # pyright: ignore[reportArgumentType]
    words = " ".join(read(text).text) if format == "html" else text
    assert not re.search(r"\b(nan|NaN|None|Infinity)\b", words)
    if format == "json":
        assert len(json.loads(text)["stages"]) == len(stages)
    show(RunRecord("r", "m", stages=stages), Console(file=io.StringIO(), width=80))


def test_a_baseline_alone_is_a_whole_page(full_run: RunRecord) -> None:
    reader = read(render(replace(full_run, stages=full_run.stages[:1]), "html"))
    text = " ".join(reader.text)
    assert "Only the baseline has been measured: perplexity 28.69" in text and "What to try" not in text
    assert reader.tags.count("svg") == 2


def test_a_long_record_stays_readable(long_run: Callable[[], RunRecord]) -> None:
    record = long_run()
    page = render(record, "html")
    reader = read(page)
    assert sum(len(stage.layers) for stage in record.stages) == 600
    assert reader.tags.count("details") == 4 and len(page) < 2_500_000
    assert all(layer.name in page for layer in record.stages[2].layers)


@pytest.mark.parametrize("width", [60, 80, 120, 220])
def test_terminal_table_fits_its_terminal(full_run: RunRecord, width: int) -> None:
    out = io.StringIO()
    show(full_run, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in "".join(lines[:8])
    assert all(any(stage.stage in line and columns.number(stage.perplexity) in line for line in lines) for stage in full_run.stages)


def test_plain_tables_are_aligned_and_complete(full_run: RunRecord) -> None:
    header, rule, *rows = stage_table(full_run).splitlines()
    assert len(rows) == len(full_run.stages)
    ends = [match.end() for match in re.finditer("-+", rule)]
    assert all(row[end : end + 2].strip() == "" for row in (header, *rows) for end in ends)
    assert len(layer_table(full_run.stages[1]).splitlines()) == 2 + len(full_run.stages[1].layers)


@given(st.data(), st.integers(20, 120))
def test_a_fitted_table_loses_nothing_and_breaks_no_number(data: st.DataObject, width: int) -> None:
    """Words are at most 16 characters, so that a paragraph fits 20."""
    words = st.text("abcxyz", min_size=1, max_size=16)
    quantity = st.sampled_from(["1,024.5", "+0.0431 ± 0.0052", "269.3 MB", "–", "5.1 %"])
    columns = data.draw(st.integers(1, 5))
    numeric = [data.draw(st.booleans()) for _ in range(columns)]
    cell = {True: quantity, False: st.lists(words | quantity, min_size=1, max_size=4).map(" ".join)}
    rows = [[data.draw(cell[right]) for right in numeric] for _ in range(data.draw(st.integers(1, 4)))]
    lines = fitted_table([f"c{place}" for place in range(columns)], rows, numeric, width).splitlines()
    assert max(map(len, lines)) <= max(width, 24)
    text = "\n".join(lines)
    for row in rows:
        for cell_, right in zip(row, numeric, strict=True):
            assert all(part in text for part in ([cell_] if right else re.split(" (?![±%M]|0\\.0052)", cell_)))
