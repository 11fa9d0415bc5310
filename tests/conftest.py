"""What every folder's tests may use: the small trained model, its text, a cache of their own, and one thread."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels' tests run in Triton's interpreter; read when triton is first imported

SMALL = Path(__file__).parent / "small_model"


@pytest.fixture(autouse=True, scope="session")
def torch_threads() -> None:
    """Tests are small: one thread is fastest, and sums do not depend on the machine's core count."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def imports_are_no_garbage() -> Iterator[None]:
    """Every stage collects garbage before it counts memory; half a second of it goes over what imports made, which stays anyway."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def small_model() -> Path:
    """Directory of a Llama of 0.72 M parameters that was trained (tests/small_model/README.md), with its tokenizer."""
    return SMALL / "model"


@pytest.fixture(scope="session")
def small_text() -> Path:
    """A jsonl file of Wikipedia excerpts that the small model has never seen."""
    return SMALL / "text.jsonl"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory in place of the user's."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("BITMEND_CACHE", str(directory))
    return directory
