"""The cache of measured choices: kept on disk by device, rebuilt when damaged or foreign, never in the way."""

import json
import logging
from pathlib import Path

import pytest
import torch
from bitmend.kernels import choices

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "bitmend"))
    choices.forget()
    return tmp_path


def entry(choice: str):
    return lambda: {"choice": choice, "reason": "a test"}


def test_measured_once_kept_on_disk() -> None:
    assert choices.remembered(CPU, "a", entry("one"))["choice"] == "one"
    assert choices.remembered(CPU, "a", entry("two"))["choice"] == "one"
    choices.forget()
    assert choices.remembered(CPU, "a", entry("three"))["choice"] == "one"
    assert choices.known(CPU, "b") is None


def test_two_writers_keep_each_others_entries() -> None:
    choices.remembered(CPU, "a", entry("one"))
    choices.forget()
    choices.remembered(CPU, "b", entry("two"))
    assert set(choices.entries(CPU)) == {"a", "b"}


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"version": 0}', json.dumps({"version": choices.VERSION, "device": "another", "entries": {"a": 1}})]
)
def test_damaged_or_foreign_files_are_measured_anew(content: str) -> None:
    path = choices.cache_file(CPU)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert choices.entries(CPU) == {}
    assert choices.remembered(CPU, "a", entry("new"))["choice"] == "new"
    assert set(choices.entries(CPU)) == {"a"}


def test_a_directory_that_cannot_be_written_is_a_warning(fresh: Path, caplog: pytest.LogCaptureFixture) -> None:
    (fresh / "bitmend").write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        assert choices.remembered(CPU, "a", entry("one"))["choice"] == "one"
    assert "cannot be written" in caplog.text


def test_threads_are_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    before = choices.cache_file(CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert choices.cache_file(CPU) != before and "77 threads" in choices.device_name(CPU)
