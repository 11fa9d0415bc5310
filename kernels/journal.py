"""A benchmark's finished results, appended to a file line by line, so that a stopped benchmark resumes.

Knows JSON; not what is measured.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Results under keys. The first line says what they were measured with (`context`); lines of another context are dropped, since
    results of different contexts must not be mixed, and a line torn by a kill is measured again. Without a path nothing is kept."""

    def __init__(self, path: Path | None, context: Mapping[str, Any]) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        if path is None:
            return
        lines = _lines(path)
        plain = json.loads(json.dumps(context))
        if lines and lines[0] == plain:
            self._known = {line["key"]: line["result"] for line in lines[1:]}
            _write(path, [plain, *lines[1:]])
        else:
            _write(path, [plain])

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._known[key]

    def add(self, key: str, result: Any) -> Any:
        self._known[key] = result
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": result}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return result

    def close(self) -> None:
        """The benchmark is complete: the next one begins anew."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _lines(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _write(path: Path, lines: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    os.replace(scratch, path)
