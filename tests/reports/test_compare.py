"""Comparison of runs: the line of the unbeaten, losers named at equal bytes, noise and foreign protocols respected."""

import json
import re
from dataclasses import replace

import pytest
from bitmend.reports.compare import entries
from bitmend.reports.record import Protocol, RunRecord, StageRecord, TextRecord
from bitmend.reports.render import compare

PROTOCOL = Protocol("wikitext2", "test", fingerprint="a", seq_len=512, windows=40)


def made(name: str, perplexity: float | None, size: int | None, stderr: float = 0.004, protocol: Protocol = PROTOCOL) -> RunRecord:
    stages = (
        StageRecord("baseline", perplexity=20.0, total_bytes=1000, seconds=5.0, peak_bytes=7_000_000),
        StageRecord(
            "quantize", "gptq", perplexity, total_bytes=size, nll_difference_stderr=stderr, seconds=10.0, peak_bytes=3, settings={"bits": 3}
        ),
    )
    return RunRecord(name, "demo", protocol, stages if perplexity is not None else (StageRecord("baseline"),))


def test_unbeaten_runs_make_the_line_and_losers_say_to_whom() -> None:
    actual = {
        entry.run: entry
        for entry in entries([made("small", 40.0, 100), made("middle", 30.0, 200), made("worse", 35.0, 200), made("big", 25.0, 300)])
    }
    assert [name for name, entry in actual.items() if entry.on_front] == ["small", "middle", "big"]
    assert actual["worse"].beaten_by == "middle" and "loses to middle at equal bytes: +0.1542 ± 0.0080" in actual["worse"].verdict
    assert all(actual[name].beaten_by is None for name in ("small", "middle", "big"))


def test_equal_bytes_means_within_one_percent_and_fewer_bytes_are_reported() -> None:
    near = {entry.run: entry for entry in entries([made("a", 30.0, 1000), made("b", 25.0, 1009)])}
    assert near["a"].beaten_by == "b" and "at equal bytes" in near["a"].verdict
    far = {entry.run: entry for entry in entries([made("a", 30.0, 1000), made("b", 25.0, 1011)])}
    assert far["a"].beaten_by is None
    assert "with 50 % fewer bytes" in entries([made("a", 30.0, 1000), made("b", 25.0, 500)])[0].verdict


def test_a_difference_within_noise_beats_nobody() -> None:
    assert entries([made("a", 30.3, 100, stderr=0.004), made("b", 30.0, 100, stderr=0.004)])[0].beaten_by is None
    assert entries([made("a", 30.3, 100, stderr=0.001), made("b", 30.0, 100, stderr=0.001)])[0].beaten_by == "b"


def test_runs_of_different_protocols_are_not_judged_against_each_other() -> None:
    runs = [made("a", 30.0, 100), made("b", 25.0, 100, protocol=replace(PROTOCOL, seq_len=2048))]
    assert [entry.beaten_by for entry in entries(runs)] == [None, None]
    for format in ("table", "md", "html"):
        assert "different protocols" in compare(runs, format)
        assert "not beaten" not in compare(runs, format) and "not judged: no other run has its model and protocol" in compare(runs, format)
        assert "Window, tokens: 512 (a), 2,048 (b)." in compare(runs, format)
    assert "different protocols" in json.loads(compare(runs, "json"))["warnings"][0]
    assert [row["pareto"] for row in json.loads(compare(runs, "json"))["runs"]] == [False, False]
    assert "different protocols" not in compare([runs[0], runs[0]], "table")


def test_only_runs_of_one_text_and_one_model_are_judged_against_each_other() -> None:
    other_text = made("c", 10.0, 100, protocol=replace(PROTOCOL, fingerprint="b"))
    other_model = replace(made("d", 10.0, 100), model="another")
    actual = {entry.run: entry for entry in entries([made("a", 30.0, 100), made("b", 25.0, 100), other_text, other_model])}
    assert actual["a"].beaten_by == "b" and actual["b"].verdict == "not beaten by a run of its size or below"
    assert actual["c"].verdict == actual["d"].verdict == "not judged: no other run has its model and protocol"
    text = compare([made("a", 30.0, 100), other_text, other_model], "md")
    assert "Fingerprint: a (a, d), b (c)." in text and "different models (demo (a, c), another (d))" in text
    assert entries([made("a", 30.0, 100)])[0].verdict == "not beaten by a run of its size or below"


@pytest.mark.parametrize("width", [40, 60, 80, 140, 200])
def test_a_comparison_is_as_wide_as_it_may_be(width: int) -> None:
    runs = [made("a run of some name", 31.2034, 101_000_000), made("b", 25.5, 202_000_000, protocol=replace(PROTOCOL, windows=9))]
    lines = compare(runs, "table", width).splitlines()
    assert max(map(len, lines)) <= width
    assert {"31.20", "25.50", "202.0 MB"} <= {part.strip() for line in lines for part in re.split(r"  +|: ", line)}


def test_a_record_from_before_dtypes_was_float32_and_the_device_does_not_matter() -> None:
    old = made("old", 30.0, 100)
    now = made("now", 31.0, 100, protocol=replace(PROTOCOL, dtype="float32", device="cuda"))
    assert "different protocols" not in compare([old, now], "md")
    halved = made("halved", 31.0, 100, protocol=replace(PROTOCOL, dtype="bfloat16", device="cpu"))
    assert "different protocols" in compare([old, halved], "md") and "bfloat16" in compare([old, halved], "md")


def test_every_format_names_every_run_with_its_numbers() -> None:
    runs = [made("first run", 31.2034, 101_000_000), made("second run", 25.5, 202_000_000), made("never measured", None, None)]
    for format in ("table", "md", "html"):
        text = compare(runs, format)
        assert all(
            part in text for part in ("first run", "second run", "31.20", "25.50", "101.0 MB", "202.0 MB", "gptq 3 bit", "15 s", "7.00 MB")
        )
        assert "Not measured yet: never measured" in text
    data = json.loads(compare(runs, "json"))
    assert [(row["run"], row["perplexity"], row["pareto"], row["seconds"]) for row in data["runs"]] == [
        ("first run", 31.2034, True, 15.0), ("second run", 25.5, True, 15.0)
    ]  # fmt: skip
    page = compare(runs, "html")
    assert "://" not in page and page.count("<svg") == 1


def test_runs_without_sizes_and_no_runs_are_served() -> None:
    for runs in ([], [made("a", None, None)], [made("a", 30.0, None)]):
        for format in ("table", "md", "html", "json"):
            assert compare(runs, format)
    with pytest.raises(ValueError, match="'csv'"):
        compare([], "csv")  # pyright: ignore[reportArgumentType]


def test_further_texts_have_their_columns_and_their_warning() -> None:
    def also(run: RunRecord, fingerprint: str) -> RunRecord:
        last = replace(run.stages[-1], texts={"news": TextRecord(perplexity=17.25)})
        return replace(run, stages=(*run.stages[:-1], last), texts={"news": replace(PROTOCOL, fingerprint=fingerprint)})

    runs = [also(made("a", 30.0, 100), "x"), made("b", 25.0, 100), also(made("c", 24.0, 90), "x")]
    for format in ("table", "md", "html"):
        assert "perplexity, news" in compare(runs, format) and "17.25" in compare(runs, format)
        assert "measured news under different" not in compare(runs, format)
    assert "measured news under different protocols" in compare([*runs, also(made("d", 24.0, 90), "y")], "md")
