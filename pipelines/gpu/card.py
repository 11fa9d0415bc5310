"""The card and the versions of the software it runs with, as one line of JSON: `python -m bitmend.pipelines.gpu.card`."""

import json
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

NEEDED = {
    "kernels": ("torch", "triton", "numpy"),
    "tests": ("torch", "triton", "numpy", "pytest", "transformers", "safetensors", "accelerate", "pydantic", "yaml", "typer", "rich", "scipy", "jinja2", "matplotlib"),
    "pipeline": ("torch", "triton", "numpy", "transformers", "safetensors", "accelerate", "pydantic", "yaml", "typer", "rich", "scipy", "jinja2", "matplotlib"),
}  # fmt: skip
"""Import names by part; parts that are not named run the pipeline."""

FETCHED = {
    "numpy": "numpy", "pytest": "pytest", "safetensors": "safetensors", "pydantic": "pydantic", "yaml": "PyYAML", "typer": "typer",
    "rich": "rich", "scipy": "scipy", "jinja2": "Jinja2", "matplotlib": "matplotlib",
}  # fmt: skip
"""Those that `make gpu-packages` can fetch, by what they are called there. The others come with torch for the card's driver."""


def missing(part: str) -> list[str]:
    """Packages without which a part cannot run."""
    return [name for name in NEEDED.get(part, NEEDED["pipeline"]) if find_spec(name) is None]


def way_out(absent: Sequence[str]) -> str:
    """Where missing packages come from."""
    own = [name for name in absent if name not in FETCHED]
    if own:
        return f"give a Python that has {', '.join(own)}: PYTHON=…"
    names, version = " ".join(FETCHED[name] for name in absent), ".".join(map(str, sys.version_info[:2]))
    return f'where there is a network, `make gpu-packages FETCH="{names}" PYTHON_VERSION={version}` fetches what is missing into runs/gpu/packages'


def main(arguments: Sequence[str] = ()) -> int:
    import torch

    info = {"card": None, "python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "triton", "transformers"):
        try:
            info[name] = version(name)
        except PackageNotFoundError:
            info[name] = None
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        info |= {"card": card.name, "memory_bytes": card.total_memory, "multiprocessors": card.multi_processor_count}
        info["capability"] = ".".join(map(str, torch.cuda.get_device_capability(0)))
    sys.stdout.write(json.dumps(info) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
