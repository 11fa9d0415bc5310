"""Lay out the sources of the site: `python docs/site_source.py` copies the pages to build/docs, where mkdocs.yml looks for them.

Pages keep their places in the repository, so that a link says the same there and on the site. API pages are added, one for each
package, made of the public names' signatures and docstrings; they are read from the source, nothing is imported.
"""

import ast
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "build" / "docs"
PAGES = ("README.md", "CHANGELOG.md", "LICENSE", "docs/**/*", "recover/README.md", "reports/published/*", "tests/small_model/README.md")
"""What a page may link to, as patterns from the root."""
PACKAGES = ("compress", "recover", "kernels", "reports", "pipelines")
Definition = ast.FunctionDef | ast.ClassDef


def lay_out(target: Path = TARGET) -> list[Path]:
    """Everything that the site is made of, under an empty `target`; returns the pages."""
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = target / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    packages = [ROOT, *(path.parent for name in PACKAGES for path in sorted((ROOT / name).rglob("__init__.py")))]
    named = {".".join(("bitmend", *path.relative_to(ROOT).parts)): path for path in packages}
    api = target / "docs" / "api"
    api.mkdir()
    for name, path in named.items():
        (api / f"{name}.md").write_text(api_page(name, path), encoding="utf-8")
    lines = [f"- [`{name}`]({name}.md)" for name in named]
    (api / "README.md").write_text("\n".join(["# API", "", "Public names of each package, from their docstrings.", "", *lines, ""]), encoding="utf-8")
    return sorted(target.rglob("*.md"))


def api_page(name: str, package: Path) -> str:
    """What a package says of itself; its modules with their public functions and classes."""
    parts = [f"# {name}\n", escaped(ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or "")]
    for path in sorted(package.glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        public = [node for node in module.body if isinstance(node, Definition) and not node.name.startswith("_")]
        if path.stem != "__init__" and public:
            parts.append(f"## {path.stem}\n\n{escaped(ast.get_docstring(module) or '')}\n")
            parts += [section for node in public for section in _definition(node, 3)]
    return "\n".join(parts)


def _definition(node: Definition, level: int) -> Iterator[str]:
    """A heading, the signature, the docstring; of a class its public methods, too."""
    yield f"{'#' * level} {node.name}\n\n```python\n{_signature(node)}\n```\n\n{escaped(ast.get_docstring(node) or '')}\n"
    if isinstance(node, ast.ClassDef):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and not item.name.startswith("_") and ast.get_docstring(item):
                yield from _definition(item, level + 1)


def _signature(node: Definition) -> str:
    """The definition without its body; of a class the annotated fields, with what they are by default."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        fields = [f"    {ast.unparse(item)}" for item in node.body if isinstance(item, ast.AnnAssign)]
        return "\n".join([f"class {node.name}{f'({bases})' if bases else ''}:", *fields]) if fields else f"class {node.name}({bases})"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}"


def escaped(text: str) -> str:
    """Prose that Markdown leaves as it is; what stands between backticks it does anyway."""
    parts = text.split("`")
    return "`".join(part if place % 2 else re.sub(r"([\\*_\[\]<>#|])", r"\\\1", part) for place, part in enumerate(parts))


if __name__ == "__main__":
    print(f"{len(lay_out())} pages in {TARGET.relative_to(ROOT)}", file=sys.stderr)
