"""What the compiler makes of the kernels for cards that are not here: as published, without spills, within the shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from bitmend.kernels import compiled_form
from bitmend.kernels.candidates import G16, WHOLE
from bitmend.kernels.compiled_form import CAPABILITIES, INTEGER_ROWS, compiled, configurations, default_for, integer_launches, launches
from bitmend.kernels.launch import INTERPRETED
from bitmend.reports import published

SCRIPT = """
import json, sys
from bitmend.kernels import candidates, compiled_form as form
found = [form.compiled(launch, (9, 0)) for blocks in (candidates.WHOLE, candidates.G16) for launch in form.launches(128 if blocks is candidates.WHOLE else 1, blocks)]
print(json.dumps(found))
"""


def test_a_kernel_without_the_matrix_unit_reads_16_bytes_and_spills_nothing(tmp_path: Path) -> None:
    """In a process without the interpreter; with the Triton of the published table, its very numbers."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    actual = json.loads(done.stdout)
    assert len(actual) == 3, "a whole dequantization, the down-projection, the product"
    for row in actual:
        assert (row["spilled_bytes"], row["matrix"], row["load_bits"]) == (0, "", 128), row
    table = published.read("kernels-static")
    if table["protocol"]["triton"] == triton.__version__:
        names = {"dequantize_kernel": actual[0], "project_kernel": actual[1], "gemv_kernel": actual[2]}
        for row in table["rows"]:
            if row["card"] == "sm_90" and row["kernel"] in names and row["rows"].split(", ")[0] in ("1", "128") and row["n"] in (16, None):
                assert row["registers"] == names[row["kernel"]]["registers"], (row, "make publish TABLE=kernels-static")


def test_the_published_table_is_of_these_configurations_and_none_spills() -> None:
    rows = published.read("kernels-static")["rows"]
    assert {row["card"] for row in rows} == {f"sm_{major}{minor}" for major, minor in CAPABILITIES}
    assert not [row for row in rows if row["spilled_bytes"] or not row["fits"]]
    listed = {(row["card"], row["kernel"], row["n"], row["m"], row["warps"], row["stages"], int(n)) for row in rows for n in row["rows"].split(", ")}
    for count, blocks in configurations():
        for launch in launches(count, blocks):
            options = launch.options
            shape = options.get("BLOCK_N"), options.get("BLOCK_M"), options["num_warps"], options["num_stages"], count
            assert ("sm_90", launch.kernel.__name__, *shape) in listed, (blocks, "make publish TABLE=kernels-static")
    for count in INTEGER_ROWS:
        for blocks, _, launch in (actual for x_group in (64, -1) for actual in integer_launches(count, x_group)):
            shape = launch.options.get("BLOCK_N"), launch.options["BLOCK_M"], launch.options["num_warps"], launch.options["num_stages"], count
            assert ("sm_90", launch.kernel.__name__, *shape) in listed, (blocks, "make publish TABLE=kernels-static")


def test_every_default_is_compiled() -> None:
    known = set(configurations())
    for capability in CAPABILITIES:
        for rows in compiled_form.ROWS:
            assert (rows, default_for(rows, capability)) in known


def test_launches_need_no_memory() -> None:
    names = [launch.kernel.__name__ for launch in launches(1, G16)]
    assert names == ["project_kernel", "gemv_kernel"] and [launch.kernel.__name__ for launch in launches(2048, WHOLE)] == ["dequantize_kernel"]
    for x_group, names in ((64, ["_quantize_down_kernel", "_lowbit_kernel"]), (-1, ["_quantize_rows_kernel", "_levels_kernel"])):
        actual = [launch.kernel.__name__ for _, _, launch in integer_launches(64, x_group)]
        assert list(dict.fromkeys(actual)) == names and actual.count(names[0]) == 1


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's refusal")
def test_the_interpreter_compiles_nothing() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1: the interpreter compiles nothing"):
        compiled(launches(1, G16)[0], (9, 0))
