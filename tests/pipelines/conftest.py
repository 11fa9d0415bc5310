"""One finished run that tests may read, never change; and a cache that is not the user's."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bitmend.pipelines.run import runner

from .runs import Processes, chosen, processes


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Outside of `cache`, too, nothing is written into the user's."""
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("cache")
        patch.setenv("BITMEND_CACHE", str(directory))
        yield directory


@pytest.fixture(autouse=True, scope="session")
def float32_on_a_cpu() -> Iterator[None]:
    """What `dtype: auto` is on a CPU follows from a measurement; a test's numbers must not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitmend.pipelines.devices.compute.measured_dtype", lambda: torch.float32)
        yield


@pytest.fixture(autouse=True, scope="session")
def few_held_out_tokens() -> Iterator[None]:
    """Choosing the best step on all of them would take most of a short training's time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitmend.pipelines.stages.inputs.HELD_OUT_TOKENS", 512)
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, small_model: Path, small_text: Path) -> Path:
    """The run directory of CHAIN on the small model, never interrupted."""
    place = tmp_path_factory.mktemp("finished")
    runner.run(chosen(place, small_model, small_text), place / "run", device="cpu")
    return place / "run"


@pytest.fixture(scope="session")
def commands(own_cache: Path, torch_threads: None) -> Iterator[Processes]:
    with processes() as actual:
        yield actual


@pytest.fixture(scope="module")
def no_pages() -> Iterator[None]:
    """Runs without the seconds that drawing report.html takes, those of a file's own fixtures, too; `finished` has a real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitmend.reports.page.html", lambda record: "html\n")
        yield
