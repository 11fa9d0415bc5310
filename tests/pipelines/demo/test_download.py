"""Fetching one file of a wheel with the real pip, from a directory in place of a registry."""

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from bitmend.pipelines.demo import download
from bitmend.pipelines.demo.download import WheelFile, cache_directory, fetch
from bitmend.pipelines.errors import InputError, OutOfMemoryError

CONTENT = b"the bytes that were wanted " * 1000


def write_wheel(directory: Path, content: bytes = CONTENT) -> WheelFile:
    """A wheel that pip accepts, and the description of the file in it."""
    directory.mkdir(exist_ok=True)
    metadata = b"Metadata-Version: 2.1\nName: bitmend-test-carrier\nVersion: 1.0\nRequires-Dist: does-not-exist-anywhere\n"
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {
        "carrier/data.bin": content,
        "bitmend_test_carrier-1.0.dist-info/METADATA": metadata,
        "bitmend_test_carrier-1.0.dist-info/WHEEL": wheel,
    }
    record = ""
    path = directory / "bitmend_test_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(data)}\n"
        archive.writestr("bitmend_test_carrier-1.0.dist-info/RECORD", record)
    return WheelFile(
        requirement="bitmend-test-carrier==1.0",
        wheel_bytes=path.stat().st_size,
        member="carrier/data.bin",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size_bytes=len(CONTENT),
        licence="none",
    )


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An otherwise offline pip whose only index is a directory."""
    directory = tmp_path / "wheels"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return directory


def test_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("BITMEND_CACHE")
    assert cache_directory() == tmp_path / "shared" / "bitmend"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "bitmend"


def test_a_file_is_fetched_once_and_progress_is_reported(cache: Path, registry: Path):
    file = write_wheel(registry)
    reported: list[tuple[str, int, int]] = []
    path = fetch(file, lambda *progress: reported.append(progress))
    assert path == cache / "downloads" / "data.bin" and path.read_bytes() == CONTENT
    assert reported[-1] == ("downloading bitmend-test-carrier==1.0", file.wheel_bytes, file.wheel_bytes)
    for wheel in registry.iterdir():
        wheel.unlink()
    assert fetch(file) == path
    assert sorted(entry.name for entry in path.parent.iterdir() if not entry.name.endswith(".lock")) == ["data.bin"]


def test_offline_the_message_says_what_is_wanted_and_where_it_goes(cache: Path, registry: Path):
    file = write_wheel(registry)
    wheel = next(registry.iterdir())
    hidden = wheel.rename(registry.parent / wheel.name)
    with pytest.raises(InputError) as caught:
        fetch(file)
    message = str(caught.value)
    assert "\n" not in message and "No matching distribution found for bitmend-test-carrier==1.0" in message
    assert "pip download --no-deps bitmend-test-carrier==1.0" in message and "'carrier/data.bin'" in message
    target = cache / "downloads" / "data.bin"
    assert message.endswith(f"put it at {target}")
    with zipfile.ZipFile(hidden) as archive:
        target.write_bytes(archive.read("carrier/data.bin"))
    assert fetch(file) == target


def test_a_whole_wheel_is_kept_as_it_is(cache: Path, registry: Path):
    member = write_wheel(registry)
    content = next(registry.iterdir()).read_bytes()
    file = replace(member, member=None, sha256=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
    path = fetch(file)
    assert path == cache / "downloads" / "bitmend-test-carrier-1.0.whl" and path.read_bytes() == content
    path.unlink()
    next(registry.iterdir()).unlink()
    with pytest.raises(InputError, match=f"put the wheel at {path}"):
        fetch(file)


def test_asking_again_after_a_failure_succeeds(cache: Path, registry: Path):
    registry.mkdir()
    absent = write_wheel(registry.parent / "elsewhere")
    with pytest.raises(InputError):
        fetch(absent)
    assert fetch(write_wheel(registry)).read_bytes() == CONTENT


def test_other_bytes_than_expected_are_refused_and_not_kept(cache: Path, registry: Path):
    file = write_wheel(registry, CONTENT[:-1] + b"!")
    with pytest.raises(InputError, match=f"sha256 .* instead of {file.sha256}"):
        fetch(file)
    assert not (cache / "downloads" / "data.bin").exists()
    write_wheel(registry)
    assert fetch(file).read_bytes() == CONTENT


def test_progress_is_counted_while_files_come_and_go(tmp_path: Path):
    """pip deletes whole directories between two looks; that is not a failed download."""
    (tmp_path / "stays").write_bytes(b"1234")
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            for deep in (tmp_path / f"{n}" / "a" / "b" for n in range(20)):
                deep.mkdir(parents=True)
                (deep / "file").write_bytes(b"")
            for n in range(20):
                shutil.rmtree(tmp_path / f"{n}")

    other = threading.Thread(target=churn)
    other.start()
    try:
        assert {download.bytes_below(tmp_path) for _ in range(300)} == {4}
    finally:
        done.set()
        other.join()


def test_a_damaged_file_in_the_cache_is_fetched_again(cache: Path, registry: Path):
    file = write_wheel(registry)
    path = fetch(file)
    path.write_bytes(CONTENT[:100])
    assert fetch(file).read_bytes() == CONTENT


def test_a_wheel_without_the_member_is_refused(cache: Path, registry: Path):
    with pytest.raises(InputError, match=r"does not hold carrier/other\.bin"):
        fetch(replace(write_wheel(registry), member="carrier/other.bin"))


def test_a_wheel_downloaded_before_an_interruption_is_used(cache: Path, registry: Path):
    file = write_wheel(registry)
    scratch = cache / "downloads" / ".data.bin.scratch"
    scratch.mkdir(parents=True)
    wheel = next(registry.iterdir())
    wheel.rename(scratch / wheel.name)
    assert fetch(file).read_bytes() == CONTENT
    assert not scratch.exists()


def test_an_unwritable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: Path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BITMEND_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match=r"cannot be written .*; set BITMEND_CACHE"):
        fetch(write_wheel(registry))


def test_a_full_disk_is_named(cache: Path, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho 'ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device'\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(OutOfMemoryError, match=r"no disk space left for .* MB; free space there or set BITMEND_CACHE"):
        fetch(write_wheel(registry))


def test_two_processes_share_one_download(cache: Path, registry: Path, tmp_path: Path):
    file = write_wheel(registry)
    program = (
        "import logging\nlogging.basicConfig(level=20)\n"
        "from bitmend.pipelines.demo.download import WheelFile, fetch\n"
        f"print(fetch({file!r}).stat().st_size)\n"
    )
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    pair = [
        subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in pair]
    assert [out.strip() for out, _ in outputs] == [str(len(CONTENT))] * 2, outputs
    assert sum("MB) into" in log for _, log in outputs) == 1
