"""`gpu-<card>.json` and `.md`: results of the parts, on disk after every piece, and what is left. It is the state that the next call reads.

Knows rows under keys; not how they were measured.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .child import ROOT

SCHEMA = 1
FOLDERS = ("compress", "recover", "kernels", "pipelines", "tests")
VERSIONS = ("torch", "triton", "transformers", "cuda")


def sources() -> str:
    """Eight digits that change with the program or its tests."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


class Results:
    """One file for each card. Rows of another version of torch, triton or transformers are dropped when their part is measured again."""

    def __init__(self, directory: Path, short: str, machine: Mapping[str, Any], columns: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        self.path, self.columns = directory / f"gpu-{short}.json", columns
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        if known and known.get("schema") != SCHEMA:
            raise ValueError(f"{self.path}: schema {known.get('schema')!r}, this program writes {SCHEMA}; move it away")
        self.parts: dict[str, Any] = known.get("parts", {})
        self.machine = dict(machine)

    def begin(self, part: str, again: bool, by_sources: bool) -> "CardPart":
        """The part with the rows that it has; without any if `again`, or when they were measured with something else."""
        context = {name: self.machine.get(name) for name in VERSIONS} | ({"sources": sources()} if by_sources else {})
        known = self.parts.get(part)
        if again or known is None or known["context"] != context:
            self.parts[part] = {"context": context, "rows": {}, "left": None, "notes": {}}
        return CardPart(self, part)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": SCHEMA, "machine": self.machine, "parts": self.parts}
        _replace(self.path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        _replace(self.path.with_suffix(".md"), self.markdown())

    def markdown(self) -> str:
        lines = [f"# {self.machine['card']}", "", ", ".join(f"{key} {value}" for key, value in self.machine.items() if key != "card")]
        for name, part in self.parts.items():
            lines += ["", f"## {name}", ""]
            rows = list(part["rows"].values())
            if name == "tests":
                counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "failed", "skipped")}
                lines += [", ".join(f"{count} {outcome}" for outcome, count in counts.items()) + ".", ""]
                rows = [{"test": key} | row for key, row in part["rows"].items() if row["outcome"] == "failed"]
            if rows:
                titles, keys = [title for _, title in self.columns[name]], [key for key, _ in self.columns[name]]
                cells = [[_cell(key, row.get(key)) for key in keys] for row in rows]
                lines += [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *cells)]
            lines += ["", *(f"- {note}" for note in part["notes"].values())]
            lines += [f"- left: {', '.join(part['left'])}"] if part["left"] else []
        return "\n".join(lines) + "\n"


class CardPart:
    """The rows of one part; each is on disk when `add` returns."""

    def __init__(self, results: Results, name: str) -> None:
        self.results, self.name, self._known = results, name, results.parts[name]
        self.say: Callable[[str], None] = lambda line: print(f"{name}: {line}", flush=True)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self._known["rows"]

    @property
    def left(self) -> list[str] | None:
        """What the next call has to do; None before the first."""
        return self._known["left"]

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        self.rows[key] = dict(row)
        self.results.save()

    def remain(self, left: Sequence[str]) -> None:
        self._known["left"] = list(left)
        self.results.save()

    def note(self, about: str, text: str | None) -> None:
        """A sentence below the table, in place of an earlier one about the same."""
        if text is None:
            self._known["notes"].pop(about, None)
        elif self._known["notes"].get(about) != text:
            self._known["notes"][about] = text
            self.say(text)
        self.results.save()


def _cell(key: str, value: Any) -> str:
    """Short, its unit taken from the key's name."""
    if value is None:
        return "–"
    if isinstance(value, int | float) and key.endswith("bytes"):
        return f"{value / 1e9:.3g} GB" if value >= 1e9 else f"{value / 1e6:.3g} MB"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
