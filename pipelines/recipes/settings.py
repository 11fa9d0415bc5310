"""Settings as text: YAML scalars without surprises, dotted keys, layers that lie over one another, and the nearest known name.

Knows no stage and no method; `recipe` does. YAML is read by the rules of version 1.2: `2:4` is text (1.1 makes it 124),
`1e-3` is a number (1.1 makes it text), and only true/false are booleans.
"""

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from ..errors import UsageError

_SCALARS = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
    ("tag:yaml.org,2002:float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.nan|\.NaN|\.NAN)$", "-+."),
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars; a key written twice is an error."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # none of those of YAML 1.1  # pyright: ignore[reportIncompatibleVariableOverride]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # the parent says so
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands here twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which `_Loader`, or a reader of YAML 1.1, would take for something else."""


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    try:
        return int(node.value)  # 0010 is ten, not eight
    except ValueError as error:  # more digits than Python converts
        raise yaml.constructor.ConstructorError(None, None, f"a number of {len(node.value)} digits", node.start_mark) from error


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse(text: str, origin: str) -> Any:
    """The YAML value of `text`; UsageError names `origin`, the line and the problem."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{origin}{line}: not readable as YAML: {error.problem or error.context}") from error
    except RecursionError as error:
        raise UsageError(f"{origin}: nested too deep to be settings") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # what PyYAML makes of `!!float x`
        raise UsageError(f"{origin}: not readable as YAML: a value does not fit its tag ({error})") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{origin}: not readable as YAML: {' '.join(str(error).split())}") from error


def read_mapping(path: Path) -> dict[str, object]:
    """A settings file; UsageError if it is missing, unreadable or not a mapping with text keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as text ({error})") from error
    results = parse(text, str(path))
    if results is None:
        return {}
    if not isinstance(results, dict):
        raise UsageError(f"{path}: holds a {type(results).__name__}; expected `key: value` lines (see `pipeline show`)")
    return results


def absolute(source: object) -> Any:
    """A path that exists, independent of the working directory, so that a run can be resumed from anywhere."""
    if not isinstance(source, str) or source in ("", "demo"):
        return source
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else source


def dump(value: object) -> str:
    """YAML that `parse` reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140, default_flow_style=False)


def split_assignment(text: str) -> tuple[str, object]:
    """`quantize.bits=3` → ("quantize.bits", 3); the value is YAML."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UsageError(f"--set {text}: expected KEY=VALUE, as in --set quantize.bits=3")
    return key, parse(value, f"--set {key}")


def nested(keys: Iterable[str], value: object) -> Any:
    """("a", "b"), 3 → {"a": {"b": 3}}"""
    for key in reversed(list(keys)):
        value = {key: value}
    return value


def merged(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, Any]:
    """`above` laid over `below`: mappings merge key by key, everything else is replaced."""
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        result[key] = merged(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return result


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """One line for an unknown name: the nearest known one, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown {what} {str(name)!r}{hint} known: {', '.join(names) or 'none'}"


def refuse_unknown(what: str, names: Iterable[object], known: Iterable[str], where: str) -> None:
    """UsageError for the first of `names` that is not known."""
    known = set(known)
    for name in names:
        if name not in known:
            raise UsageError(f"{where}: {unknown(what, name, known)}")
