"""Reference results in `published/`: a table as JSON and Markdown, its figure as PNG and SVG, and rows that survive a kill.

Knows rows (mappings) and columns; not what was measured. A publishing command appends each finished row to `Rows` and, when
run again, measures only what is missing.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .drawing import save
from .json_values import JsonObject, finite, mapping, sequence
from .record import Protocol
from .tables import markdown_table
from .units import duration, exact, number, percent, size

DIRECTORY = Path(__file__).resolve().parent / "published"
"""In the repository, too, where the package is a farm of links: a table written next to the links would be lost with them."""
SCHEMA = 1
"""Of a published table."""

FORMATS: dict[str, Callable[[Any], str]] = {
    "perplexity": number,
    "bytes": size,
    "seconds": duration,
    "percent": percent,
    "number": number,
    "exact": exact,
    "text": lambda value: number(value, 6),
}
"""How a column is written in Markdown; JSON keeps every digit."""


class PublishedRows:
    """An append-only file of JSON lines, one per finished row, identified by the fields named in `keys`.

    The first line holds `context` (protocol, versions, settings: whatever makes rows comparable); a file of another context
    is refused. A line torn by a kill is dropped. PublishedRows with the same identity: the last one counts.
    """

    def __init__(self, path: Path | str, keys: Sequence[str], context: Mapping[str, object] | None = None) -> None:
        self.path = Path(path)
        self.keys = tuple(keys)
        self._rows: dict[str, JsonObject] = {}
        head = {"keys": list(self.keys), "context": finite(dict(context or {}))}
        head = json.loads(json.dumps(head))
        lines = self._read()
        if lines and lines[0] != head:
            changed = _first_difference(lines[0], head)
            raise ValueError(f"{self.path} holds rows measured otherwise ({changed}); delete it to measure anew, or name another file")
        if not lines:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._append(head)
        for row in lines[1:]:
            self._rows[self._identity(row)] = row

    def __contains__(self, identity: object) -> bool:
        return isinstance(identity, Mapping) and self._identity(identity) in self._rows

    def __iter__(self) -> Iterator[JsonObject]:
        return iter(list(self._rows.values()))

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, **identity: object) -> JsonObject | None:
        return self._rows.get(self._identity(identity))

    def append(self, row: Mapping[str, object]) -> None:
        """Writes the row to disk before it returns; numbers that are not finite are stored as null."""
        plain = json.loads(json.dumps(finite(dict(row)), allow_nan=False))
        self._append(plain)
        self._rows[self._identity(plain)] = plain

    def missing(self, wanted: Sequence[Mapping[str, object]]) -> list[Mapping[str, object]]:
        """Those of `wanted` that have no row yet, in their order."""
        return [identity for identity in wanted if identity not in self]

    def _identity(self, row: Mapping[str, object]) -> str:
        absent = [key for key in self.keys if key not in row]
        if absent:
            raise ValueError(f"{self.path}: a row is identified by {', '.join(self.keys)}; {absent[0]!r} is missing in {dict(row)}")
        return json.dumps([row[key] for key in self.keys])

    def _append(self, value: Mapping[str, object]) -> None:
        with self.path.open("ab") as file:
            file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> list[Any]:
        """The whole lines; a torn tail is cut off so that the next row starts on a line of its own."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return [json.loads(line) for line in whole.splitlines() if line.strip()]


Columns = Sequence[str | tuple[str, str] | tuple[str, str, str]]


def write(
    name: str,
    rows: Sequence[Mapping[str, object]],
    columns: Columns,
    protocol: Protocol | Mapping[str, object] | None = None,
    figure: Figure | None = None,
    *,
    title: str = "",
    notes: Sequence[str] = (),
    directory: Path | str | None = None,
) -> list[Path]:
    """Writes name.json, name.md and, with a figure, name.png and name.svg into `directory` (default: reports/published).

    columns: keys of the rows in the order of the table, each `key`, `(key, title)` or `(key, title, format)` with a format of
    FORMATS; JSON holds all fields of the rows. notes: sentences below the table. Returns the paths written.
    """
    place = DIRECTORY if directory is None else Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    known = [_column(column) for column in columns]
    described = _protocol(protocol)
    table = [{str(key): value for key, value in finite(dict(row)).items()} for row in rows]
    data = {"schema": SCHEMA, "name": name, "title": title, "protocol": described, "notes": list(notes), "rows": table}
    written = [_replace(place / f"{name}.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")]
    written.append(_replace(place / f"{name}.md", _markdown(name, title, table, known, described, notes, figure is not None)))
    return written + (save(figure, place / name) if figure is not None else [])


def read(name: str, directory: Path | str | None = None) -> dict[str, Any]:
    """The JSON object that `write` made."""
    path = (DIRECTORY if directory is None else Path(directory)) / f"{name}.json"
    data = json.loads(path.read_text())
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {data.get('schema')!r}, this program reads {SCHEMA}")
    return data


def _markdown(
    name: str,
    title: str,
    rows: Sequence[Mapping[str, object]],
    columns: Sequence[tuple[str, str, str]],
    protocol: Mapping[str, object],
    notes: Sequence[str],
    drawn: bool,
) -> str:
    body = [[FORMATS[style](row.get(key)) for key, _, style in columns] for row in rows]
    parts = [
        f"# {title or name}\n",
        markdown_table([heading for _, heading, _ in columns], body, [style != "text" for *_, style in columns]),
    ]
    parts += [f"![{title or name}]({name}.png)\n"] if drawn else []
    parts += ["".join(f"- {note}\n" for note in notes)] if notes else []
    if protocol:
        lines = [
            (str(key), json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else number(value, 7))
            for key, value in protocol.items()
        ]
        parts += ["## Protocol\n", markdown_table(("field", "value"), lines, (False, False))]
    return "\n".join(parts)


def _column(column: str | tuple[str, ...]) -> tuple[str, str, str]:
    """(key, title, format), the format guessed from the key where it is not given."""
    key, *rest = (column,) if isinstance(column, str) else column
    heading = rest[0] if rest else key.replace("_", " ")
    style = rest[1] if len(rest) > 1 else _guess(key)
    if style not in FORMATS:
        raise ValueError(f"column {key!r}: unknown format {style!r}; choose one of {', '.join(FORMATS)}")
    return key, heading, style


def _guess(key: str) -> str:
    if key.endswith("bytes"):
        return "bytes"
    if key.endswith("seconds"):
        return "seconds"
    if key in ("sparsity", "gap_closed", "top1_agreement") or key.endswith("_share"):
        return "percent"
    return (
        "text"
        if key in ("method", "model", "layer", "variant", "name", "note", "notes", "verdict")
        else "exact"
        if key == "seed"
        else "number"
    )


def _protocol(protocol: Protocol | Mapping[str, object] | None) -> JsonObject:
    plain = protocol.to_json() if isinstance(protocol, Protocol) else dict(protocol or {})
    return finite({key: value for key, value in plain.items() if value is not None and value != {}})


def _replace(path: Path, text: str) -> Path:
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text)
    scratch.replace(path)
    return path


def _first_difference(old: object, new: Mapping[str, object]) -> str:
    if not isinstance(old, Mapping) or set(old) != set(new):
        return "no such file of rows"
    if old["keys"] != new["keys"]:
        return f"rows identified by {', '.join(map(str, sequence(old['keys'])))} instead of {', '.join(map(str, sequence(new['keys'])))}"
    before, after = mapping(old["context"]), mapping(new["context"])
    key = next(key for key in {**before, **after} if before.get(key) != after.get(key))
    return f"{key} was {before.get(key)!r} and is {after.get(key)!r}"
