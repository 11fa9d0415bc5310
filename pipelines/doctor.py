"""`pipeline doctor`: this machine's versions, threads, memory, disk, devices, a short measurement of its arithmetic, and what is missing.

Every problem comes with the line that fixes it. Changes nothing, reaches for no network.
"""

import os
import platform
import shutil
import statistics
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "transformers", "tokenizers", "safetensors", "accelerate", "peft", "bitsandbytes", "compressed-tensors", "datasets",
    "gguf", "mwparserfromhell", "scipy", "typer", "rich", "pydantic", "PyYAML", "jinja2", "matplotlib",
)  # fmt: skip
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
DEMO_DISK_BYTES = 3 * 10**9
DEMO_MEMORY_BYTES = 4 * 10**9


def report() -> dict[str, object]:
    """Sections of plain values, and `missing`: a list of {what, fix}."""
    packages = installed()
    sections: dict[str, object] = {
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "packages": packages,
    }
    if packages["torch"] is not None:
        sections |= {"torch": torch_settings(), "devices": devices(), "arithmetic": arithmetic(), "kernels": kernels()}
    sections |= {"memory": memory(), "disk": disk(), "hub": hub(), "cache": cache()}
    sections["missing"] = missing(sections)
    return sections


def installed() -> dict[str, str | None]:
    """Package → version, None where it is not installed."""
    result: dict[str, str | None] = {}
    for package in (*PACKAGES, *(("triton",) if sys.platform == "linux" else ())):
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            result[package] = None
    return result


def torch_settings() -> dict[str, object]:
    import torch

    return {
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "cuda_build": torch.version.cuda,
    }


def devices() -> list[dict[str, Any]]:
    """The CPU, and each CUDA device with its memory."""
    import torch

    result: list[dict[str, object]] = [{"device": "cpu", "name": cpu_name(), "total_bytes": _memory_limit()}]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"sm_{properties.major}{properties.minor}"
            result.append({"device": f"cuda:{index}", "name": f"{properties.name} ({capability})", "total_bytes": properties.total_memory})
    return result


def arithmetic(size: int = 1024, repeats: int = 5) -> dict[str, object]:
    """Measured GFLOP/s of a square matrix product in float32 and bfloat16, median of a few, and which is faster here."""
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    speeds: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        left, right = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
        torch.mm(left, right)
        seconds = []
        for _ in range(repeats):
            _synchronize(where)
            begun = time.perf_counter()
            torch.mm(left, right)
            _synchronize(where)
            seconds.append(time.perf_counter() - begun)
        speeds[str(dtype).removeprefix("torch.")] = 2 * size**3 / statistics.median(seconds) / 1e9
    faster = max(speeds, key=lambda name: speeds[name])
    return {"device": where, **{f"{name}_gflops": round(speed, 1) for name, speed in speeds.items()}, "faster": faster}


def kernels() -> dict[str, object]:
    """Triton, and which backends compressed linears have here, why one is missing, and what was measured to choose among them."""
    import torch

    result: dict[str, object] = {"triton": find_spec("triton") is not None, "interpreter": os.environ.get("TRITON_INTERPRET") == "1"}
    try:
        from ..kernels.linear import describe
    except ImportError as error:
        return result | {"import_error": str(error)}
    return result | describe("cuda" if torch.cuda.is_available() else "cpu")


def memory() -> dict[str, Any]:
    return {"limit_bytes": _memory_limit(), "available_bytes": _meminfo("MemAvailable")}


def disk() -> dict[str, object]:
    """Free bytes where runs go by default and where the cache lies."""
    cache_directory = _cache_directory()
    here = Path.cwd()
    return {"here": str(here), "here_free_bytes": _free(here), "cache_free_bytes": _free(cache_directory)}


def hub() -> dict[str, object]:
    """Variables that steer the Hub libraries; of a token only whether it is set."""
    settings: dict[str, object] = {name: os.environ.get(name) for name in (*OFFLINE, "HF_HOME", "HF_ENDPOINT")}
    settings["token"] = "set" if os.environ.get("HF_TOKEN") else None
    settings["offline"] = any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE)
    return settings


def cache() -> dict[str, Any]:
    """The program's own cache (demo model and text, checksums, tuning)."""
    directory = _cache_directory()
    files = [path for path in directory.rglob("*") if path.is_file()] if directory.is_dir() else []
    return {"directory": str(directory), "files": len(files), "total_bytes": sum(path.stat().st_size for path in files)}


def missing(sections: dict[str, Any]) -> list[dict[str, str]]:
    """What stands in the way, each with the line that fixes it."""
    result = [
        {"what": f"the package {name} is not installed", "fix": f"{Path(sys.executable).name} -m pip install {name}"}
        for name, version_found in sections["packages"].items()
        if version_found is None
    ]
    torch_section = sections.get("torch")
    if torch_section and torch_section["cores"] and torch_section["threads"] > torch_section["cores"]:
        line = f"export OMP_NUM_THREADS={torch_section['cores']}"
        result.append({"what": f"{torch_section['threads']} threads on {torch_section['cores']} cores", "fix": line})
    if shutil.which("nvidia-smi") and torch_section and torch_section["cuda_build"] is None:
        line = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
        result.append({"what": "an NVIDIA driver, but a torch built for the CPU only", "fix": line})
    if (available := sections["memory"]["available_bytes"]) is not None and available < DEMO_MEMORY_BYTES:
        result.append({"what": f"{available / 1e9:.1f} GB of memory available, the demo takes up to 4", "fix": "close other programs"})
    if sections["disk"]["here_free_bytes"] < DEMO_DISK_BYTES:
        free = sections["disk"]["here_free_bytes"] / 1e9
        result.append({"what": f"{free:.1f} GB free here, the demo takes up to 3", "fix": "pipeline run … -o DIR on another disk"})
    if (broken := sections.get("kernels", {}).get("import_error")) is not None:
        result.append(
            {"what": f"the kernels cannot be imported: {broken}", "fix": f"{Path(sys.executable).name} -m pip install --upgrade triton"}
        )
    if not os.access(_existing(Path(sections["cache"]["directory"])), os.W_OK):
        what = f"the cache directory {sections['cache']['directory']} cannot be written"
        result.append({"what": what, "fix": "export BITMEND_CACHE=DIR"})
    return result


def _cache_directory() -> Path:
    from ..kernels.cache import cache_directory

    return cache_directory()


def _synchronize(where: str) -> None:
    if where == "cuda":
        import torch

        torch.cuda.synchronize()


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _memory_limit() -> int:
    """Physical memory, or the control group's limit where that is lower."""
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text.isdigit():
            return min(physical, int(text))
    return physical


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())


def _free(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free
