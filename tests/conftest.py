"""What every folder's tests may use: the small trained model, its text, a cache of their own, and one thread."""

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

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


class ThreadRank:
    """One thread of several that stand in for processes: what is handed to maths that several processes share."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, box: list[Any]) -> None:
        self.rank, self.size, self.barrier, self.box = rank, size, barrier, box

    def gathered(self, value: Any) -> list[Any]:
        self.box[self.rank] = value
        self.barrier.wait()
        values = list(self.box)
        self.barrier.wait()
        return values

    def ordered_sum(self, like: Tensor) -> "ThreadSum":
        return ThreadSum(self, like)


class ThreadSum:
    def __init__(self, thread: ThreadRank, like: Tensor) -> None:
        self.thread, self.sum = thread, torch.full_like(like, -0.0)

    def add(self, tensor: Tensor | None) -> None:
        for value in self.thread.gathered(None if tensor is None else tensor.clone()):
            if value is not None:
                self.sum = self.sum + value

    def total(self) -> Tensor:
        return self.sum


@pytest.fixture(scope="session")
def side_by_side() -> Callable[[int, Callable[[ThreadRank], Any]], list[Any]]:
    """(size, work) → what `work` gave on each of so many threads."""

    def run(size: int, work: Callable[[ThreadRank], Any]) -> list[Any]:
        barrier, box = threading.Barrier(size, timeout=60), [None] * size

        def one(rank: int) -> Any:
            try:
                return work(ThreadRank(rank, size, barrier, box))
            except BaseException:
                barrier.abort()
                raise

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(one, range(size)))

    return run
