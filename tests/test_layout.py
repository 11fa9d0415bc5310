"""The layout is a promise: imports point downward, and our folders do not stand in the way of packages with the same names."""

import ast
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# folder → sibling folders it may import
ALLOWED = {
    "compress": set(),
    "kernels": {"compress"},
    "recover": {"compress", "kernels"},
    "reports": set(),
    "pipelines": {"compress", "recover", "kernels", "reports"},
}
RECORDS = {"weights", "grids", "normal_float", "ggml_types", "ggml_grids", "packing", "precision", "activation_grid", "integer_scales", "ranges"}
"""Of compress, what says how a stored weight or an input is represented, and what range a setting lies in: all that kernels and recover may know
of it; no solver, no statistics."""
COMPRESS_MAY_IMPORT = {"torch", "scipy", "numpy", "annotated_types"}
LOOSE = {"__init__", "cli", "doctor", "errors", "logs"}  # the files of pipelines/ that lie in no room
ROOMS = (
    "ranks", "recipes", "demo", "text", "store", "devices", "formats", "models", "evaluation", "stages", "allocation", "planning", "run", "export",
    "bench", "publish", "gpu", "commands",
)  # fmt: skip
"""The rooms of pipelines/, each of which may import itself and those before it."""


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """(level, dotted name) of every import in a file, function-level ones included."""
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            out += [(node.level, node.module or alias.name) for alias in node.names] if not node.module else [(node.level, node.module)]
        elif isinstance(node, ast.Import):
            out += [(0, alias.name) for alias in node.names]
    return out


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_point_downward(folder: str) -> None:
    files = modules(folder)
    assert files
    for path in files:
        depth = len(path.relative_to(ROOT).parts) - 1  # dots that lead to the package bitmend
        for level, name in imports(path):
            assert not name.startswith("bitmend"), f"{path}: imports {name}; inside the folders imports are relative"
            if level == depth + 1:
                sibling = name.split(".")[0]
                assert sibling == folder or sibling in ALLOWED[folder], f"{path}: {folder} must not import {sibling}"


def test_pipelines_is_a_house_of_rooms() -> None:
    loose = {path.stem for path in (ROOT / "pipelines").glob("*.py")}
    assert loose == LOOSE, f"{loose ^ LOOSE}: a new file of pipelines/ belongs into a room"
    rooms = {path.parent.name for path in (ROOT / "pipelines").glob("*/__init__.py")}
    assert rooms == set(ROOMS)


def test_rooms_import_those_below_them() -> None:
    """`errors`, `logs` and `doctor` are below all rooms, `cli` above; what is imported inside a function counts."""
    rank = {name: number for number, name in enumerate(ROOMS, 1)} | {"errors": 0, "logs": 0, "doctor": 0, "cli": len(ROOMS) + 1}
    upward = [
        f"{module} → {target}"
        for module, targets in internal_imports().items()
        for target in targets
        if module.count(".") and module.startswith("pipelines.") and target.startswith("pipelines.")
        if rank[module.split(".")[1]] < rank[target.split(".")[1]]
    ]
    assert not upward, upward


def test_no_circle_of_modules() -> None:
    graph = internal_imports()
    while leaves := [module for module, targets in graph.items() if not (targets & graph.keys()) - {module}]:
        for module in leaves:
            del graph[module]
    assert not graph, f"these modules import one another in a circle, or lead into one: {sorted(graph)}"


def test_no_two_files_of_one_name() -> None:
    names = [path.stem for folder in ALLOWED for path in modules(folder) if not path.stem.startswith("__")]
    twice = {name for name in names if names.count(name) > 1}
    assert not twice, f"{sorted(twice)}: a name says one thing in the whole project"


def test_no_two_classes_of_one_name() -> None:
    """Private ones aside: `Site` or `Run` must not mean one thing here and another there."""
    where: dict[str, list[str]] = {}
    for path in (path for folder in ALLOWED for path in modules(folder)):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: places for name, places in where.items() if len(places) > 1}


def test_the_map_is_the_tree() -> None:
    """docs/development.md names every file of every folder and room, in its place, and none that is not there."""
    drawn: dict[str, list[str]] = {}
    block = (ROOT / "docs" / "development.md").read_text(encoding="utf-8").split("```")[1]
    folder = place = ""
    for line in block.strip().splitlines():
        first = line.split()[0]
        if not line.startswith(" "):
            folder = place = first.rstrip("/")
        elif line.startswith("  ") and line[2] != " " and first.endswith("/"):
            place = f"{folder}/{first.rstrip('/')}"
        drawn.setdefault(place, []).extend(re.findall(r"[\w]+", line))
    there = {place: {p.stem for p in (ROOT / place).glob("*.py") if not p.stem.startswith("__")} for place in drawn}
    assert set(there) == {*ALLOWED, *(f"pipelines/{room}" for room in ROOMS)}
    assert {place: sorted(stems - set(drawn[place])) for place, stems in there.items() if stems - set(drawn[place])} == {}, "not on the map"
    everything = set().union(*there.values())
    for place, words in drawn.items():
        astray = {word for word in words if "_" in word} - there[place]
        assert not astray, f"{place}: {sorted(astray)} {'lie elsewhere' if astray & everything else 'are no files'}"


def test_promises_have_their_proofs() -> None:
    """Every test that docs/promises.md names is there."""
    text = (ROOT / "docs/promises.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    missing = [f"{file}::{name}" for file, name in named if f"def {name}(" not in (ROOT / file).read_text(encoding="utf-8")]
    assert len(named) > 10 and not missing


@pytest.mark.parametrize("page", ["README.md", "docs/development.md", "docs/promises.md", "reports/published/README.md", "recover/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?: \"[^\"]*\")?\)", (ROOT / page).read_text(encoding="utf-8"))
    assert not [link for link in links if not ((ROOT / page).parent / link).is_file()]


def internal_imports() -> dict[str, set[str]]:
    """Module → our modules that it imports, in functions too: dotted from the root ("pipelines.run.runner")."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for folder in ALLOWED for path in modules(folder)}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    actual: dict[str, set[str]] = {}
    for name, path in names.items():
        package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                targets |= {full if (full := f"{base}.{alias.name}") in names else base for alias in node.names}
        actual[name] = targets
    return actual


@pytest.mark.parametrize("folder", ["kernels", "recover"])
def test_of_compress_only_the_representation_is_known(folder: str) -> None:
    known = {target for module, targets in internal_imports().items() if module.split(".")[0] == folder for target in targets}
    seen = {target.split(".")[1] for target in known if target.startswith("compress.")}
    assert seen <= RECORDS, f"{folder} imports {sorted(seen - RECORDS)} of compress"


def test_compress_imports_torch_and_scipy_only() -> None:
    for path in modules("compress"):
        outside = {name.split(".")[0] for level, name in imports(path) if level == 0} - set(sys.stdlib_module_names)
        assert outside <= COMPRESS_MAY_IMPORT, f"{path}: {outside - COMPRESS_MAY_IMPORT}"


def test_every_package_is_in_the_import_map() -> None:
    import tomllib

    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    actual = {
        "bitmend." + ".".join(path.parent.relative_to(ROOT).parts) for folder in ALLOWED for path in (ROOT / folder).rglob("__init__.py")
    }
    assert declared == actual | {"bitmend"} and (ROOT / "__init__.py").is_file()


def test_started_from_the_root_bitsandbytes_and_transformers_do_not_trip_over_our_folders() -> None:
    code = "import bitsandbytes, transformers, importlib.util as u; from transformers import AutoModelForCausalLM; import bitmend.kernels; print('fine')"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr[-2000:]


def test_a_wheel_brings_every_package_and_its_data(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(copy_of_sources(tmp_path)),
    ]
    subprocess.run(build, check=True, capture_output=True, text=True, timeout=300)
    wheel = next(tmp_path.glob("bitmend-*.whl"))
    with zipfile.ZipFile(wheel) as packed:
        carried = next(name for name in packed.namelist() if name.endswith("/LICENSE"))
        assert packed.read(carried) == (ROOT / "LICENSE").read_bytes()
    place = tmp_path / "env"
    venv.create(place, with_pip=False, system_site_packages=False)
    site = next(place.glob("lib/python*/site-packages"))
    subprocess.run(
        [sys.executable, "-P", "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=300
    )
    outside = next(p for p in sys.path if p.endswith("site-packages"))
    code = (
        "import bitmend.compress.methods, bitmend.kernels, bitmend.recover, bitmend.reports, bitmend.pipelines.recipes.recipe as r, bitmend.pipelines.cli;"
        "assert 'compress_and_recover' in r.known_recipes(), r.known_recipes(); print(bitmend.pipelines.cli.__file__)"
    )
    (site / "outside.pth").write_text(outside)
    done = subprocess.run([place / "bin" / "python", "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(site) in done.stdout


def copy_of_sources(tmp_path: Path) -> Path:
    """The tracked files alone, so that building leaves nothing in the tree."""
    import shutil

    copy = tmp_path / "sources"
    keep = {"pyproject.toml", "README.md", "LICENSE", "__init__.py", *ALLOWED}
    for name in keep:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            copy.mkdir(exist_ok=True)
            shutil.copy(source, copy / name)
    return copy
