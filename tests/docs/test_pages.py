"""The pages are true: links and anchors lead somewhere, commands parse, settings exist, numbers are those of the published tables."""

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from bitmend.pipelines import cli
from bitmend.pipelines.recipes.recipe import resolve

ROOT = Path(__file__).parents[2]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
PAGES = ["README.md", "CHANGELOG.md", "recover/README.md", "reports/published/README.md", "tests/small_model/README.md", *DOCS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?: \"[^\"]*\")?\)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
COMMAND = typer.main.get_command(cli.app)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose_of(page: str) -> str:
    return FENCE.sub("", text_of(page))


def blocks_of(page: str, *languages: str) -> list[str]:
    return [block for language, block in FENCE.findall(text_of(page)) if language in languages]


def script(name: str) -> ModuleType:
    """A script of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def anchors(page: Path) -> frozenset[str]:
    """As GitHub and mkdocs make them of headings, where both make the same."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings)


def links(page: str) -> Iterator[tuple[Path, str]]:
    """(file, anchor) of the links of a page to files here."""
    for target in LINK.findall(SPAN.sub("", prose_of(page))):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            yield ((ROOT / page).parent / file).resolve() if file else ROOT / page, anchor


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page: str) -> None:
    missing = [f"{file.name}#{anchor}" for file, anchor in links(page) if not file.is_file() or (anchor and anchor not in anchors(file))]
    assert not missing


def test_every_page_is_reached_from_the_readme() -> None:
    seen, ahead = set(), ["README.md"]
    while ahead:
        page = ahead.pop()
        seen.add(page)
        files = [file.relative_to(ROOT).as_posix() for file, _ in links(page) if file.suffix == ".md" and file.is_relative_to(ROOT)]
        ahead += [file for file in files if file not in seen]
    assert set(PAGES) <= seen


def test_the_readme_takes_five_minutes() -> None:
    assert len(text_of("README.md").splitlines()) <= 90


def commands(page: str) -> Iterator[list[str]]:
    """The arguments of every `pipeline` command in the page's blocks."""
    for block in blocks_of(page, "sh"):
        for line in block.splitlines():
            for command in line.partition(" #")[0].split(";"):
                words = shlex.split(command)
                if words[:1] == ["pipeline"]:
                    yield words[1:]


def parsed(arguments: list[str]) -> dict[str, Any]:
    """The parameters of a command, by the parser of the command line itself."""
    command, rest = command_of(arguments)
    return command.make_context("pipeline", rest).params


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that words begin with, and the words after its name."""
    command: Any = COMMAND
    while (known := getattr(command, "commands", None)) and words[:1] and not words[0].startswith("-"):
        assert words[0] in known, f"pipeline {' '.join(words)}: no such command"
        command, words = known[words[0]], words[1:]
    return command, list(words)


@pytest.mark.parametrize("page", [page for page in PAGES if "pipeline" in text_of(page)])
def test_commands_parse_and_their_settings_are_valid(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's settings are resolved, too: names, types and ranges, not whether the model is there."""
    monkeypatch.chdir(ROOT)
    for arguments in commands(page):
        given = parsed(arguments)
        if arguments[0] in ("run", "sweep"):
            names = ("model", "data", "calibration", "train", "seed", "dtype", "profile", "revision", "budget", "teacher")
            options = {name: given[name] for name in names} | {"eval": given["eval_"]}
            resolve(given["recipe"], file=given["config"], sets=given["sets"] or [], options=options)
            for over in given.get("over") or []:
                key, _, values = over.partition("=")
                for value in values.split(","):
                    resolve(given["recipe"], sets=[f"{key}={value}"], options=options)


@pytest.mark.parametrize("page", [page for page in PAGES if "`pipeline " in text_of(page)])
def test_commands_in_sentences_exist(page: str) -> None:
    """What stands in a sentence may leave out arguments; commands and options must be there."""
    for span in SPAN.findall(prose_of(page)):
        if not span.startswith("pipeline "):
            continue
        command, words = command_of(shlex.split(span)[1:])
        options = {name for parameter in command.params for name in parameter.opts}
        assert not [word for word in words if word.startswith("--") and word not in options], span


@cache
def known_settings() -> frozenset[str]:
    """`stage.setting` of all methods and `section.setting` of recipes, from the catalog."""
    catalog = json.loads(text_of("pipelines/recipes/catalog.json"))
    stages = {f"{stage}.{item['name']}" for stage, rows in catalog["methods"].items() for row in rows.values() for item in row["settings"]}
    methods = {f"{stage}.method" for stage in catalog["methods"]}
    recipe = catalog["recipes"]["compress_and_recover"]["demo"]
    sections = {f"{name}.{key}" for name, section in recipe.items() if isinstance(section, dict) for key in section}
    return frozenset(stages | methods | sections)


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_are_named_exist(page: str) -> None:
    first = {name.partition(".")[0] for name in known_settings()}
    named = re.findall(r"\b([a-z]+)(?:\.\d)?\.([a-z][a-z_]*)\b(?!\()", " ".join(SPAN.findall(prose_of(page))))
    unknown = [f"{section}.{key}" for section, key in named if section in first and f"{section}.{key}" not in known_settings()]
    assert not [name for name in unknown if not (ROOT / name.replace(".", "/")).exists() and not name.endswith((".md", ".json", ".py"))]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_targets_that_are_named_exist(page: str) -> None:
    folders = ("compress/", "recover/", "kernels/", "reports/", "pipelines/", "tests/", "docs/")
    named = [span.partition("::")[0] for span in SPAN.findall(prose_of(page)) if span.startswith(folders) and not set(span) & set(" *<{…")]
    assert not [name for name in named if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()]
    makefile = text_of("Makefile")
    targets = re.findall(r"^make ([a-z-]+)", "\n".join([*blocks_of(page, "sh"), *SPAN.findall(prose_of(page))]), re.MULTILINE)
    assert not [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "python", "yaml")])
def test_blocks_of_code_are_code(page: str) -> None:
    for block in blocks_of(page, "python"):
        ast.parse(block)
    for block in blocks_of(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


def test_the_tutorials_recipe_is_the_file() -> None:
    (block,) = blocks_of("docs/tutorial.md", "yaml")
    shown, file = yaml.safe_load(block), yaml.safe_load(text_of("docs/examples/first.yaml"))
    assert shown == {key: value for key, value in file.items() if key != "about"}


def test_tables_are_what_their_sources_say() -> None:
    tables = script("page_tables")
    for page in sorted(path for pattern in tables.PAGES for path in ROOT.glob(pattern)):
        text = page.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{page}: run `python docs/page_tables.py`"
    assert tables.filled("<!-- formats {} -->\n| old |\n\nText.\n").count("| old |") == 0
    with pytest.raises(ValueError, match="grid: no row is"):
        tables.measured("grid", {"name": "gptq", "bits": 7}, ["name"])


KEYS = {
    "demo": ("stage",), "compress": ("name", "bits"), "grid": ("name", "bits"), "decompose": ("name", "bits", "rank"), "recover": ("name", "kind"),
    "perp": ("name", "pattern", "pruned"), "gguf": ("model", "type", "name"),
    "budgets": ("name", "bits"),
}  # fmt: skip
"""Table → the fields that name a row of the demo model (gguf: of any), as the title of a link has them."""
UNITS = {"": 1.0, " %": 0.01, " MB": 1e6}
CLAIM = re.compile(r"\[([\d,.]+)( %| MB)?\]\((\w+)\.md(?: \"([^\"]+)\")?\)")


def value_of(table: str, title: str) -> float:
    """What a link's title names: `KEY; KEY`, then ` → FIELD` where it is not the perplexity."""
    label, _, field = title.partition(" → ")
    rows = [row for row in script("page_tables").read(table) if (table == "gguf" or row.get("model", "demo") == "demo") and row.get("seed", 0) == 0]
    named = {"; ".join(str(row[key]) for key in KEYS[table]): row for row in rows}
    if table == "perp" and label not in named:
        named |= {label.rpartition("; ")[0]: row for label, row in named.items()}
    row = named[label]
    if field == "of_gptq":  # the share of what GPTQ leaves at these bits
        return 1 - row["nll_difference"] / named[f"gptq; {row['bits']}"]["nll_difference"]
    return row[field or "perplexity"]


def is_rounded(shown: str, value: float) -> bool:
    """Whether a number as written is the value to the nearest of its last digit."""
    return abs(float(shown.replace(",", "")) - value) <= 0.5 * 10.0 ** -len(shown.partition(".")[2]) + 1e-9


def test_every_number_in_what_the_tables_say_is_its_rows() -> None:
    claims = CLAIM.findall(text_of("reports/published/README.md"))
    assert len(claims) > 90
    wrong = []
    for number, unit, table, title in claims:
        value = value_of(table, title) / UNITS[unit]
        if not is_rounded(number, value):
            wrong.append(f"{number}{unit} of {table}, {title}: {value}")
    assert not wrong


def test_the_readmes_chart_is_of_the_published_rows() -> None:
    """Each number of the README's table of methods, by its row of bits and its column."""
    columns = ("", "rtn, clip hessian", "gptq", "AutoRound", "learned_rounding", "learned_rounding, scales and norms")
    best = {"2": "300, both losses", "3": "300, both losses", "4": "60, both losses"}
    rows = [line.strip("| ").split("|") for line in text_of("README.md").splitlines() if re.match(r"\| [234]\.\d\d \|", line)]
    assert len(rows) == 3
    for cells in rows:
        bits = cells[0].strip()[0]
        for name, cell in zip(columns[1:], cells[1:], strict=True):
            if cell.strip() == "–":
                continue
            table = "compress" if name.startswith("rtn") else "grid"
            title = f"{name} {best[bits]}; {bits}" if name.endswith("norms") else f"{name}; {bits}"
            if bits == "3":
                title = title.replace("learned_rounding, scales", "learned_rounding, 100 × 2,048, scales")
            assert is_rounded(cell.strip(" *"), value_of(table, title)), title


def test_the_readmes_demo_table_is_the_published_one() -> None:
    rows = {row["stage"]: row for row in script("page_tables").read("demo")}
    shown = [
        line.strip("| ").split(" | ")
        for line in text_of("README.md").splitlines()
        if re.match(r"\| (baseline|quantize|recover|fuse) \|", line)
    ]
    assert len(shown) == 4
    for stage, _, *numbers in shown:
        assert all(is_rounded(number, rows[stage][key]) for number, key in zip(numbers, ("perplexity", "news", "code"), strict=False))


def test_the_site_has_every_page_and_names_every_package(tmp_path: Path) -> None:
    import tomllib

    pages = {path.relative_to(tmp_path / "site").as_posix() for path in script("site_source").lay_out(tmp_path / "site")}
    assert set(PAGES) <= pages
    packages = tomllib.loads(text_of("pyproject.toml"))["tool"]["setuptools"]["packages"]
    assert {f"docs/api/{name}.md" for name in packages} <= pages
    page = (tmp_path / "site/docs/api/bitmend.compress.md").read_text(encoding="utf-8")
    assert "### gptq_uniform\n\n```python\ndef gptq_uniform(" in page and "_shift" not in page
    in_menu = re.findall(r": (\S+\.md)$", text_of("mkdocs.yml"), re.MULTILINE)
    assert len(in_menu) > 20 and not [page for page in in_menu if page not in pages]


def test_the_citation_is_of_this_version() -> None:
    import tomllib

    citation, project = yaml.safe_load(text_of("CITATION.cff")), tomllib.loads(text_of("pyproject.toml"))["project"]
    assert (str(citation["version"]), citation["license"]) == (project["version"], project["license"])
    assert f"## {project['version']} " in text_of("CHANGELOG.md")
