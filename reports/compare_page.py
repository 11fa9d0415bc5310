"""Several runs as one self-contained page: the table, the verdicts of `compare` and the figure of bytes against perplexity."""

from collections.abc import Sequence

from .columns import protocol_line, used
from .compare import Entry, columns, entries, warnings
from .drawing import WIDTH, inline_svg
from .page import LABELS, Plot, records, template
from .plots import Look, pareto_figure
from .record import RunRecord
from .units import number


def comparison_html(runs: Sequence[RunRecord]) -> str:
    """A self-contained page: the table, the verdicts and the figure."""
    result = entries(runs)
    hidden = {"verdict"} if len({entry.model for entry in result}) > 1 else {"verdict", "bits_per_byte"}
    sentences = [("protocol", LABELS["protocol"], text) for text in warnings(runs)]
    for entry in result:
        if entry.verdict:
            kind = "loses" if entry.beaten_by else "unbeaten"
            sentences.append((kind, LABELS[kind], f"{entry.run}: {entry.verdict}."))
    return template("compare.html.jinja").render(
        title=f"{len(result)} runs compared",
        models=", ".join(dict.fromkeys(entry.model for entry in result)),
        protocol_line="; ".join(dict.fromkeys(protocol_line(run.protocol) for run in runs)),
        sentences=sentences,
        figures=_figures(result),
        runs=records([column for column in used(columns(result), result) if column.key not in hidden], result),
    )


def _figures(result: Sequence[Entry]) -> list[Plot]:
    plots = []
    for index, protocol in enumerate(dict.fromkeys(entry.protocol for entry in result)):
        rows: list[dict[str, object]] = [
            {
                "megabytes": entry.stage.total_bytes / 1e6,
                "perplexity": entry.stage.perplexity,
                "run": entry.run,
                "kind": "loses" if entry.beaten_by else "unbeaten",
            }
            for entry in result
            if entry.protocol == protocol and entry.stage.total_bytes is not None
        ]
        if rows:
            look = Look("size on disk, MB", "perplexity", log_y=True, width=WIDTH)
            figure = pareto_figure(rows, "megabytes", "perplexity", "run", "kind", look=look)
            text = "Down and to the left is better; the line joins the runs that no other beats in both."
            described = ", ".join(f"{row['run']} {number(row['megabytes'])} MB {number(row['perplexity'])}" for row in rows)
            plots.append(Plot("Perplexity against total bytes", text, inline_svg(figure, f"plot{index}", described)))
    return plots
