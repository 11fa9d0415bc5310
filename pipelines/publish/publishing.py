"""Reference results: one command a table that measures what is missing and writes `reports/published/NAME.{json,md,png,svg}`.

    python -m bitmend.pipelines.publish.publishing NAME [-o RUN_DIR] [--only PATTERN] [--model demo|small]

Run it from the root of the repository. It can be stopped and continued: stages are artifacts of one run directory for each model, rows are
kept as they are finished, and rows that were published before count as long as their methods' versions stand. What is measured is data in
`reference`; a row that the program refuses is a row with the reason.
"""

import argparse
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ...reports import published
from ...reports.json_values import text
from ...reports.plots import Look, lines_figure, pareto_figure
from ...reports.record import RunRecord
from .. import logs
from ..bench import kernel_tables
from ..doctor import cpu_name
from ..errors import InputError, UsageError
from ..export.exporting import export
from ..recipes import recipe
from ..recipes.stage_settings import methods
from ..run import runner
from ..run.evaluate import evaluate
from ..stages.inputs import Inputs
from ..store.rundir import RunDirectory
from . import budget_table, demo_table, gguf_table, gptq_speed_table, operator_table, other_programs, scale_table
from .reference_rows import DEMO, SETTINGS, SMALL, ReferenceRow, ReferenceTable
from .reference_tables import tables

SMALL_MODEL = Path("tests/small_model")
OWN = {
    DEMO: demo_table.publish, demo_table.DTYPES: demo_table.publish_dtypes, operator_table.NAME: operator_table.publish, gguf_table.NAME: gguf_table.publish,
    kernel_tables.STATIC: kernel_tables.publish_static, scale_table.NAME: scale_table.publish, gptq_speed_table.NAME: gptq_speed_table.publish,
    budget_table.NAME: budget_table.publish,
}  # fmt: skip
"""Tables that are no list of runs."""
MEASURED = (
    ("perplexity", "perplexity", "perplexity"), ("nll_difference", "Δ nats to dense", "exact"), ("nll_difference_stderr", "±", "exact"),
    ("other_baseline_perplexity", "other text, dense", "perplexity"), ("other_perplexity", "other text", "perplexity"),
    ("bits_per_weight", "bits per weight", "number"), ("total_bytes", "bytes", "bytes"), ("sparsity", "sparsity", "percent"),
    ("gap_closed", "gap closed", "percent"), ("trainable_parameters", "trained", "exact"), ("seconds", "seconds", "seconds"), ("peak_bytes", "memory", "bytes"),
    ("verdict", "at equal bytes", "text"),
)  # fmt: skip


def publish(name: str, directory: Path, only: str | None = None, model: str | None = None) -> list[Path]:
    """Measure what is missing, then write the table of all rows that are there."""
    table = tables()[name]
    keys = ["model", "name", *table.tags]
    kept = published.PublishedRows(directory / f"{name}.jsonl", keys, {"settings": SETTINGS})
    _take_published(name, kept)
    for row in table.rows:
        wanted = (only is None or re.search(only, _label(row, table))) and model in (None, row.model)
        if wanted and not _stands(row, kept):
            measured = _measure(row, directory / row.model, table.other_text)
            kept.append(_identity(row) | {"versions": _versions(row), "processor": cpu_name()} | measured)
    return write(name, table, kept)


def _take_published(name: str, kept: published.PublishedRows) -> None:
    """Rows of the table as it was published, where none of this directory's own is there and the settings are the same."""
    if not (published.DIRECTORY / f"{name}.json").is_file():
        return
    table = published.read(name)
    for row in table["rows"]:
        if row not in kept and row.get("settings") == SETTINGS[row["model"]]:
            kept.append(row | {"protocol": table["protocol"].get(row["model"])})


def _versions(row: ReferenceRow) -> dict[str, int | str]:
    """Method → its version, of every stage of the row: a row stands as long as these do."""
    stages = [(name, settings["method"]) for stage in row.stages for name, settings in stage.items()]
    theirs = {} if row.rival is None else {row.rival["program"]: other_programs.VERSIONS[row.rival["program"]]}
    return theirs | {f"{name} {method}": methods(name)[method].version for name, method in stages}


def _stands(row: ReferenceRow, kept: published.PublishedRows) -> bool:
    result = kept.get(**_identity(row))
    return result is not None and result["versions"] == _versions(row)


def write(name: str, table: ReferenceTable, kept: published.PublishedRows) -> list[Path]:
    """The files of the table, from the rows that were measured."""
    result = [row for row in (kept.get(**_identity(row)) for row in table.rows if _stands(row, kept)) if row is not None]
    shown = [{k: v for k, v in row.items() if k != "protocol"} | {"settings": SETTINGS[text(row["model"])]} for row in result]
    for row in shown:
        row["verdict"] = _verdict(row, shown, table)
    figure = _figure([r for r in shown if r.get("perplexity")], table)
    columns = [("model", "model", "text"), ("name", "method", "text"), *((tag, tag, "text") for tag in table.tags), *MEASURED]
    columns = [c for c in columns if any(r.get(c[0]) not in (None, "") for r in shown)]
    protocols = {text(row["model"]): row["protocol"] for row in result if row.get("protocol")}
    return published.write(name, shown, columns, protocols, figure, title=table.title, notes=[*table.notes, *_notes(name, result, table)])


def _figure(shown: list[dict[str, Any]], table: ReferenceTable) -> Figure:
    across = table.x.replace("_", " ")
    if table.lines:
        places = Counter((row["model"], row["name"]) for row in {(r["model"], r["name"], r[table.x]): r for r in shown}.values())
        joined = [row for row in shown if places[row["model"], row["name"]] > 1]  # a single point is no line
        return lines_figure(joined, table.x, "perplexity", "name", panel=table.panel, look=Look(across, log_y=True))
    labelled = [r | {"label": " ".join(str(r[key]) for key in ("name", *table.tags)).strip()} for r in shown]
    label, panel = None if table.panel or len(shown) > 40 else "label", table.panel
    if panel not in (None, "model") and len({row["model"] for row in shown}) > 1:  # perplexities of two models share no axis
        labelled, panel = [row | {"panel": f"{row['model']}: {row[panel]}"} for row in labelled], "panel"
    shared = Counter(row.get(panel) for row in labelled if panel)  # a point alone in its panel compares with nothing
    labelled = [row for row in labelled if not panel or shared[row.get(panel)] > 1] or labelled
    return pareto_figure(labelled, x=table.x, y="perplexity", label=label, series="name", panel=panel, look=Look(across, log_y=True))


def _notes(name: str, result: list[dict[str, Any]], table: ReferenceTable) -> list[str]:
    dense = {row["model"]: row["baseline_perplexity"] for row in result if row.get("baseline_perplexity")}
    notes = [f"{model}: dense perplexity {value:.2f}." for model, value in dense.items()]
    texts = ", ".join(f"{model} {s['calibration']['samples']} × {s['calibration']['seq_len']}" for model, s in SETTINGS.items())
    notes.append(f"Calibration tokens: {texts}. Seconds and memory are those of the last stage alone.")
    notes.append(
        f"Made by `make publish TABLE={name}`: {len(result)} of {len(table.rows)} rows; {', '.join(sorted({row['processor'] for row in result}))}, 2 cores shared with other work: seconds are an upper bound."
    )
    return notes


def _verdict(row: dict[str, Any], rows: list[dict[str, Any]], table: ReferenceTable) -> str:
    """Whether another row of the same model (and the same tags of `table.within`) has at most as many bytes and a lower perplexity."""
    if not row.get("perplexity"):
        return row.get("refused", "")
    same = [r for r in rows if all(r[key] == row[key] for key in ("model", *table.within)) and r.get("perplexity")]
    better = [r for r in same if r["total_bytes"] <= row["total_bytes"] * 1.001 and r["perplexity"] < row["perplexity"]]
    if not better:
        return "on the Pareto line"
    best = min(better, key=lambda r: r["perplexity"])
    label = ", ".join(str(best[key]) for key in ("name", *table.tags) if key not in (*table.within, "seed"))
    return f"loses {math.log(row['perplexity'] / best['perplexity']):.3f} nats to {label}"


def _label(row: ReferenceRow, table: ReferenceTable) -> str:
    return " ".join(str(part) for part in (row.model, row.name, *(row.tags[tag] for tag in table.tags)))


def _identity(row: ReferenceRow) -> dict[str, object]:
    return {"model": row.model, "name": row.name, **row.tags}


def _measure(row: ReferenceRow, directory: Path, other_text: bool) -> dict[str, Any]:
    options = {"model": "demo", "profile": "demo", "budget": row.budget}
    if row.model == SMALL:
        if not SMALL_MODEL.is_dir():
            raise InputError(f"{SMALL_MODEL}: no such directory; run this from the root of the repository")
        options = {"model": str(SMALL_MODEL / "model"), "data": str(SMALL_MODEL / "text.jsonl"), "profile": "standard"}
    if row.rival is not None:
        return _measure_rival(row, directory, options, other_text)
    try:
        numbers = _numbers(runner.run(_recipe(row, options), directory, page=False))
    except UsageError as error:
        return {"refused": f"refused: {error}"}
    return numbers | (_on_other_text(directory, directory, row) if other_text else {})


def _recipe(row: ReferenceRow, options: Mapping[str, object]) -> recipe.Recipe:
    stages = [dict(stage) for stage in row.stages] or [{"fuse": {"backend": "reference"}}]
    document = {"name": "published", "seed": row.seed, "dtype": row.dtype, **SETTINGS[row.model], "stages": stages}
    return recipe.resolve(document, options=options)


def options_of_rival(row: ReferenceRow, options: Mapping[str, object], checkpoint: Path) -> dict[str, object]:
    """Those of a run on the other program's checkpoint; the dense model teaches where something trains."""
    return {**options, "model": str(checkpoint), **({"teacher": options["model"]} if row.stages else {})}


def _measure_rival(row: ReferenceRow, directory: Path, options: Mapping[str, object], other_text: bool) -> dict[str, Any]:
    """What the other program made of the baseline, as it stands or as the row's stages leave it; differences are to the dense model."""
    assert row.rival is not None
    rivals = directory.with_name(f"{directory.name}-rivals")
    dense = rivals / "dense"
    chosen = _recipe(replace(row, stages=()), options)
    first = runner.run(chosen, directory, until_stage="baseline", page=False).stages[0]
    if not dense.is_dir():
        export(directory, "dense", dense, stage="baseline")
    checkpoint, reported = other_programs.made(rivals, dense, Inputs(chosen, dense).calibration(), row.rival)
    own = other_programs.place_of(rivals, row.rival) / "run"
    record = runner.run(_recipe(row, options_of_rival(row, options, checkpoint)), own, page=False)
    numbers = _numbers(record)
    assert first.perplexity is not None
    ratio = numbers["perplexity"] / first.perplexity
    numbers |= {"nll_difference": math.log(ratio), "nll_difference_stderr": None, "baseline_perplexity": first.perplexity}
    if row.stages:
        before = record.stages[0].perplexity
        assert before is not None
        numbers["gap_closed"] = math.log(before / numbers["perplexity"]) / math.log(before / first.perplexity)
    else:
        numbers |= {"seconds": reported["seconds"], "peak_bytes": reported["peak_bytes"], "gap_closed": None}
    return numbers | (_on_other_text(directory, own, row) if other_text else {})


def _on_other_text(dense: Path, own: Path, row: ReferenceRow) -> dict[str, float]:
    """Perplexity of the first stage of one run and of the last one of another (mostly the same) on another text."""
    return {"other_baseline_perplexity": _other_text(dense, row, 0), "other_perplexity": _other_text(own, row, -1)}


def _other_text(directory: Path, row: ReferenceRow, place: int) -> float:
    """Perplexity of one of the run's stages on Python's own manual, which every Python has."""
    from pydoc_data.topics import topics

    manual = directory.parent / "manual.txt"
    manual.write_text("\n\n".join(topics[name] for name in sorted(topics)))
    stage = RunDirectory(directory).read()["stages"][place]["name"]
    settings = SETTINGS[row.model]["evaluation"] | {"dtype": row.dtype}
    return evaluate(str(directory / "stages" / stage), eval_source=str(manual), **settings)["perplexity"]


def _numbers(record: RunRecord) -> dict[str, Any]:
    first, last = record.stages[0], record.stages[-1]
    fields = (
        "perplexity", "nll_difference", "nll_difference_stderr", "kl_to_baseline", "top1_agreement", "gap_closed", "bits_per_weight",
        "total_bytes", "sparsity", "seconds", "peak_bytes", "trainable_parameters",
    )  # fmt: skip
    numbers = {field: getattr(last, field) for field in fields}
    return numbers | {"baseline_perplexity": first.perplexity, "protocol": record.protocol.to_json()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted([*OWN, *tables()]))
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/published"))
    parser.add_argument("--only", help="a regular expression on 'MODEL METHOD TAGS', as in 'demo gptq 3'")
    parser.add_argument("--model", choices=sorted(SETTINGS), help="only the rows of this model")
    given = parser.parse_args()
    logs.setup()
    place = given.output.resolve()
    own = OWN.get(given.name)
    for path in publish(given.name, place, given.only, given.model) if own is None else own(place):
        print(path)


if __name__ == "__main__":
    main()
