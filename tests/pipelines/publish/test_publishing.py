"""The reference tables: every row is a recipe that resolves, a killed measurement goes on, and a row that loses says so."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bitmend.pipelines.errors import InputError
from bitmend.pipelines.publish import budget_table, demo_table, operator_table, publishing
from bitmend.pipelines.publish.reference_rows import SMALL, ReferenceRow, ReferenceTable
from bitmend.pipelines.publish.reference_tables import tables
from bitmend.pipelines.recipes.recipe import Recipe, resolve
from bitmend.pipelines.recipes.settings import dump
from bitmend.reports import plain_rows, published
from bitmend.reports.record import Protocol, RunRecord, StageRecord, TextRecord


@pytest.mark.parametrize("name", sorted(tables()))
def test_every_row_resolves_and_no_two_share_an_identity(name: str, tmp_path: Path) -> None:
    table = tables()[name]
    assert all(row.stages or row.rival for row in table.rows)
    for stages in {json.dumps(row.stages): row.stages for row in table.rows if row.stages}.values():
        (tmp_path / "row.yaml").write_text(dump({"stages": [dict(stage) for stage in stages]}))
        assert len(resolve(str(tmp_path / "row.yaml")).stages) == len(stages)
    for row in table.rows:
        if row.rival is not None:
            assert publishing._recipe(row, publishing.options_of_rival(row, {"model": "demo", "profile": "demo"}, tmp_path)).stages
    identities = [json.dumps({"model": row.model, "name": row.name, **row.tags}) for row in table.rows]
    assert len(set(identities)) == len(identities)


@pytest.fixture
def table() -> ReferenceTable:
    stages = ({"quantize": {"method": "rtn", "bits": 4, "group_size": 32}},)
    refused = ({"quantize": {"method": "rtn", "bits": 4, "group_size": 7}},)
    return ReferenceTable("Two rows", [ReferenceRow("rtn", stages, {"bits": 4}, SMALL), ReferenceRow("odd groups", refused, {"bits": 4}, SMALL)], ("bits",))


def test_rows_are_measured_once_and_a_refusal_is_a_row(
    table: ReferenceTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    monkeypatch.chdir(Path(__file__).parents[3])
    monkeypatch.setattr(publishing, "tables", lambda: {"two": table})
    monkeypatch.setattr(published, "DIRECTORY", tmp_path / "published")
    written = publishing.publish("two", tmp_path / "runs")
    first, second = published.read("two", tmp_path / "published")["rows"]
    assert first["perplexity"] > first["baseline_perplexity"] > 1
    assert "not a multiple" in second["refused"] and second["verdict"] == second["refused"]
    assert {path.suffix for path in written} == {".json", ".md", ".png", ".svg"}
    monkeypatch.setattr(publishing, "_measure", lambda *_: pytest.fail("a finished row was measured again"))
    publishing.publish("two", tmp_path / "runs")
    publishing.publish("two", tmp_path / "elsewhere")  # what was published counts in another directory, too


def test_a_row_of_an_older_method_is_measured_again(table: ReferenceTable, tmp_path: Path) -> None:
    row = table.rows[0]
    kept = published.PublishedRows(tmp_path / "rows.jsonl", ["model", "name", "bits"])
    kept.append({"model": row.model, "name": row.name, **row.tags, "versions": {"quantize rtn": 0}})
    assert not publishing._stands(row, kept)
    kept.append({"model": row.model, "name": row.name, **row.tags, "versions": publishing._versions(row)})
    assert publishing._stands(row, kept)


def test_a_row_that_loses_at_equal_bytes_says_to_whom(table: ReferenceTable) -> None:
    def row(name: str, total_bytes: int, perplexity: float) -> dict[str, object]:
        return {"model": SMALL, "name": name, "bits": 4, "total_bytes": total_bytes, "perplexity": perplexity}

    rows = [row("small", 90, 11.0), row("good", 100, 10.0), row("bad", 100, 20.0)]
    verdicts = [publishing._verdict(r, rows, table) for r in rows]
    assert verdicts[:2] == ["on the Pareto line"] * 2
    assert verdicts[2] == "loses 0.693 nats to good, 4"


def test_two_models_share_no_panel(table: ReferenceTable) -> None:
    rows = [
        {"model": model, "name": "rtn", "bits": bits, "bits_per_weight": bits, "perplexity": value}
        for model, value in (("small", 30.0), ("demo", 20.0))
        for bits in (3, 4)
    ]
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in publishing._figure(rows, replace(table, panel="bits")).axes]
    assert [title for title in titles if title] == ["small: 3", "small: 4", "demo: 3", "demo: 4"]


def test_the_demos_table_has_plain_rows_with_the_recipes_embeddings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Recipe] = []

    def run(chosen: Recipe, directory: Path, **_: object) -> RunRecord:
        asked.append(chosen)
        stages = [StageRecord("baseline", perplexity=20.0, total_bytes=500, texts={"news": TextRecord(28.0)})]
        for number, spec in enumerate(chosen.stages):
            one = StageRecord(spec.name, spec.method, 24.0 + len(asked) - number, total_bytes=80, texts={"news": TextRecord(30.0 + len(asked))})
            stages.append(one)
        return RunRecord("r", "demo", Protocol("demo"), tuple(stages), {}, {"news": Protocol("news")})

    def missing(*_: object) -> RunRecord:
        raise InputError("no such program")

    monkeypatch.setattr(demo_table.runner, "run", run)
    monkeypatch.setattr(demo_table, "_auto_round", missing)
    monkeypatch.setattr(plain_rows, "ROWS", tmp_path / "plain.json")
    monkeypatch.setattr(published, "DIRECTORY", tmp_path)
    written = demo_table.publish(tmp_path / "runs")
    assert [path.suffix for path in written] == [".json", ".md", ".png", ".svg"] and "AutoRound's row is left out: no such program" in caplog.text
    *plain, default, gptq, dense, imitating = asked
    (own,) = [spec for spec in default.stages if spec.name == "quantize"]
    assert [spec.method for chosen in plain for spec in chosen.stages] == ["rtn", "gptq", "nf4"]
    for chosen in plain:
        (spec,) = chosen.stages
        assert (spec.include_embeddings, spec.embedding_bits, spec.head_bits) == (own.include_embeddings, own.embedding_bits, own.head_bits)
        assert chosen.evaluation == default.evaluation and chosen.data.calibration == "demo"
    rows = {row["stage"]: row for row in json.loads((tmp_path / "demo.json").read_text())["rows"]}
    assert list(rows) == ["baseline", "quantize", "recover", "fuse", "RTN", "GPTQ", "NF4", "GPTQ, trained", "dense, norms trained", "imitate"]
    (recover,) = [spec for spec in default.stages if spec.name == "recover"]
    for chosen, method in ((gptq, "scales"), (dense, "perp")):
        trained = chosen.stages[-1]
        assert (trained.method, trained.config.steps, trained.config.loss) == (method, recover.config.steps, recover.config.loss)
        assert (chosen.data.train, chosen.evaluation) == (default.data.train, default.evaluation)
    assert gptq.stages[0].settings() == plain[1].stages[0].settings() and [spec.name for spec in dense.stages] == ["recover"]
    assert imitating.name == "imitate" and imitating.stages[-2].config.loss == "distill"
    assert rows["NF4"]["perplexity"] == 27.0 and rows["NF4"]["news"] == 33.0
    stood = RunRecord.from_json(json.loads((tmp_path / "plain.json").read_text()))
    assert [stage.stage for stage in plain_rows.rivals(run(default, tmp_path))] == ["RTN", "GPTQ", "NF4"] == [s.stage for s in stood.stages]


def test_the_demos_table_has_the_other_programs_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks stay as its checkpoint has them, embeddings and evaluation are the recipe's, seconds and memory its own."""
    asked: list[Recipe] = []

    def run(chosen: Recipe, directory: Path, **_: object) -> RunRecord:
        asked.append(chosen)
        texts = {"news": TextRecord(30.0, kl_to_baseline=0.01)}
        made = StageRecord("quantize", "rtn", 23.0, total_bytes=80, seconds=3.0, kl_to_baseline=0.01, gap_closed=0.2, texts=texts)
        return RunRecord("r", "demo", Protocol("demo"), (StageRecord("baseline"), made), {})

    class Given:
        def __init__(self, *_: object) -> None: ...

        def calibration(self) -> str:
            return "windows"

    monkeypatch.setattr(demo_table.runner, "run", run)
    monkeypatch.setattr(demo_table, "Inputs", Given)
    monkeypatch.setattr(demo_table, "export", lambda *_, **__: None)
    monkeypatch.setattr(
        demo_table.other_programs, "made", lambda *asked: (tmp_path / "checkpoint", {"seconds": 70.0, "peak_bytes": 5} if asked[2] == "windows" else {})
    )
    default = resolve("compress_and_recover", options={"profile": "demo", "dtype": "float32"})
    last = demo_table._auto_round(default, tmp_path).stages[-1]
    assert (last.method, last.perplexity, last.total_bytes, last.seconds, last.peak_bytes) == ("auto_round", 23.0, 80, 70.0, 5)
    assert (last.kl_to_baseline, last.gap_closed, last.texts) == (None, None, {"news": TextRecord(30.0)}), "its run's baseline is its checkpoint"
    (chosen,), (spec,) = asked, asked[0].stages
    assert spec.method == "rtn" and spec.skips("model.layers.3.mlp.up_proj") and not spec.skips("model.embed_tokens")
    assert chosen.model == str(tmp_path / "checkpoint") and chosen.evaluation == default.evaluation and spec.embedding_bits == 6


def test_small_budgets_stand_beside_plain_gptq_in_as_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way is a plain run and one of its own, and a gap is closed from that plain row on, on every text."""
    places: dict[str, list[Recipe]] = {}

    def run(chosen: Recipe, directory: Path, **_: object) -> RunRecord:
        places.setdefault(directory.name, []).append(chosen)
        stages = [StageRecord("baseline", perplexity=20.0, texts={"news": TextRecord(28.0), "code": TextRecord(13.0)})]
        for number, spec in enumerate(chosen.stages):
            factor = 4.0 if directory.name == "budgets-plain" else 2.0 - number
            texts = {"news": TextRecord(28.0 * factor), "code": TextRecord(13.0 * factor)}
            stages.append(StageRecord(spec.name, spec.method, 20.0 * factor, total_bytes=80, texts=texts, settings=spec.settings()))
        return RunRecord("r", "demo", Protocol("demo"), tuple(stages), {}, {"news": Protocol("news"), "code": Protocol("code")})

    monkeypatch.setattr(budget_table.runner, "run", run)
    monkeypatch.setattr(published, "DIRECTORY", tmp_path)
    assert publishing.OWN["budgets"](tmp_path / "runs")
    rows = json.loads((tmp_path / "budgets.json").read_text())["rows"]
    assert [row["bits"] for row in rows] == [way.bits for way in budget_table.WAYS for _ in range(3)]
    for plain, quantized, trained in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert [[row[key] for key in ("closed", "news_closed", "code_closed")] for row in (plain, quantized, trained)] == [
            [0.0] * 3, [pytest.approx(0.5)] * 3, [pytest.approx(1.0)] * 3,
        ]  # fmt: skip
    default = resolve("compress_and_recover", options={"profile": "demo"})
    for name, runs in places.items():
        for chosen in runs:
            own = "demo" if name == "budgets-plain" else default.data.calibration
            assert (chosen.dtype, chosen.data.calibration, chosen.evaluation) == ("bfloat16", own, default.evaluation)
    guided, recover = (next(spec for spec in default.stages if spec.name == name) for name in ("quantize", "recover"))
    for name in ("budgets-4.349", "budgets-77.5MB"):
        (chosen,) = places[name]
        assert chosen.stages[0].settings() == guided.settings(), "the default recipe's own quantizer"
    assert places["budgets-77.5MB"][0].stages[1].settings() == recover.settings() and places["budgets-4.349"][0].stages[1].config.steps == 200


def test_the_recipe_in_two_dtypes_is_two_runs_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: dict[Path, str] = {}

    def run(chosen: Recipe, directory: Path, **_: object) -> RunRecord:
        places[directory] = chosen.dtype
        factor = 1.0 if chosen.dtype == "float32" else 1.01
        stages = tuple(StageRecord(spec.name, spec.method, 20.0 * factor, total_bytes=80) for spec in chosen.stages)
        return RunRecord("r", "demo", Protocol("demo"), stages)

    monkeypatch.setattr(demo_table.runner, "run", run)
    monkeypatch.setattr(published, "DIRECTORY", tmp_path)
    assert publishing.OWN["demo-dtypes"](tmp_path / "runs")
    assert sorted(places.values()) == ["bfloat16", "float32"] and len(places) == 2
    rows = json.loads((tmp_path / "demo-dtypes.json").read_text())["rows"]
    assert [(row["stage"], row["dtype"]) for row in rows[:2]] == [("quantize", "float32"), ("quantize", "bfloat16")]
    assert [row["to_float32"] for row in rows[:2]] == [0.0, pytest.approx(0.01)]


def test_what_operators_were_before_stays_with_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {"operators": 5, "views": 1, "read_bytes": 64, "copied_bytes": 0, "waits": 2}
    for shape in operator_table.SHAPES:
        for device in operator_table.DEVICES:
            (tmp_path / "operators").mkdir(exist_ok=True)
            rows = [{"method": "gptq", "shape": shape, "part": part} | counts for part in ("sweep", "model", "solver")]
            (tmp_path / "operators" / f"bench-compress-count-{shape}-{device}.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(published, "DIRECTORY", tmp_path / "published")
    operator_table.publish(tmp_path)
    data = published.read("operators", tmp_path / "published")
    assert [(row["shape"], row["part"]) for row in data["rows"]] == [(s, part) for s in operator_table.SHAPES for part in ("sweep", "solver")]
    assert all(row["cpu_operators"] == row["cuda_operators"] == 5 and row["cuda_operators_before"] is None for row in data["rows"])
    data["rows"][0]["cuda_operators_before"] = 900
    (tmp_path / "published" / "operators.json").write_text(json.dumps(data))
    operator_table.publish(tmp_path)
    assert "| 135m | sweep | – | 5 | 900 | 5 |" in (tmp_path / "published" / "operators.md").read_text().replace("  ", " ")
    assert operator_table.publish in publishing.OWN.values()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="run this from the root of the repository"):
        operator_table.publish(tmp_path)
