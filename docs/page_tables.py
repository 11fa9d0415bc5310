"""Fill the tables of the pages from where their facts live: `python docs/page_tables.py` rewrites the pages; a test compares.

    <!-- methods {"stage": "prune"} -->           what `pipeline list` says of a stage's methods
    <!-- formats {} -->                           the export formats
    <!-- measured {"table": "grid", "where": {"model": "demo", "bits": 3}, "columns": ["name", "perplexity"]} -->

Each stands on a line of its own, and the table below it, up to the next empty line, is written anew. `where` names fields of rows in
reports/published/TABLE.json and the value, or the list of values, that a row must have; rows come in the order of the list `name`, else of
the file.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bitmend.pipelines.commands.about import FORMATS
from bitmend.reports.units import duration, number, percent, size

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "reports" / "published"
PAGES = ("docs/**/*.md", "reports/published/README.md")
COLUMNS = {
    "name": ("method", str), "kind": ("model", str), "bits": ("bits", str), "rank": ("rank", str), "pruned": ("pruned", str),
    "pattern": ("pattern", str), "perplexity": ("perplexity", number), "other_perplexity": ("other text", number), "gap_closed": ("gap closed", percent),
    "bits_per_weight": ("bits per weight", number), "total_bytes": ("bytes", size), "seconds": ("time", duration), "peak_bytes": ("memory", size),
    "trainable_parameters": ("trained", lambda value: f"{value:,}"),
}  # fmt: skip
"""Field of a published row → title of its column, and how a value is written."""
MARK = re.compile(r"^<!-- (methods|formats|measured) (\{.*\}) -->\n(?:\|.*\n)*", re.MULTILINE)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    lines = [head, ["---:" if turned else "---" for turned in right], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def methods(stage: str) -> str:
    """Name, paper and what each method does, the paper linked."""
    catalog = json.loads((ROOT / "pipelines/recipes/catalog.json").read_text(encoding="utf-8"))
    rows = [[f"`{name}`", row["does"].replace("|", "\\|"), _linked(row["paper"])] for name, row in catalog["methods"][stage].items()]
    return markdown(("method", "what it does", "paper"), rows, (False,) * 3)


def _linked(paper: str) -> str:
    """`GPTQ, arXiv:2210.17323` as the paper's name with a link."""
    title, _, arxiv = paper.rpartition("arXiv:")
    return f"[{title.strip(', ') or 'arXiv:' + arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else "–"


def formats() -> str:
    return markdown(("`--format`", "what it is"), [[f"[`{name}`]({_page(name)})", text] for name, text in FORMATS.items()], (False, False))


def _page(name: str) -> str:
    return f"{name.removesuffix('-v2')}.md"


def measured(table: str, where: Mapping[str, object], columns: Sequence[str]) -> str:
    """The rows of a published table that are as `where` says. ValueError where there are none."""
    chosen = [row for row in read(table) if all(row[key] in _several(wanted) for key, wanted in where.items())]
    if not chosen:
        raise ValueError(f"{table}: no row is {where}")
    if isinstance(order := where.get("name"), list):
        chosen.sort(key=lambda row: order.index(row["name"]))
    cells = [["–" if row[key] is None else COLUMNS[key][1](row[key]) for key in columns] for row in chosen]
    return markdown([COLUMNS[key][0] for key in columns], cells, [COLUMNS[key][1] is not str for key in columns])


def _several(wanted: object) -> list[object]:
    return wanted if isinstance(wanted, list) else [wanted]


def read(table: str) -> list[dict[str, object]]:
    return json.loads((PUBLISHED / f"{table}.json").read_text(encoding="utf-8"))["rows"]


def filled(page: str) -> str:
    """A page with its tables as their sources have them."""
    kinds = {"methods": methods, "formats": formats, "measured": measured}
    return MARK.sub(lambda mark: f"<!-- {mark[1]} {mark[2]} -->\n{kinds[mark[1]](**json.loads(mark[2]))}", page)


if __name__ == "__main__":
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        before = path.read_text(encoding="utf-8")
        if (after := filled(before)) != before:
            path.write_text(after, encoding="utf-8")
            print(path.relative_to(ROOT))
