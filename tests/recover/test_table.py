from pathlib import Path

from bitmend.recover import method_tables
from bitmend.recover.method_tables import KINDS, kinds_table, methods_table
from bitmend.recover.recovery_methods import RECOVER

PROMISED = [
    "reconstruct",
    "lora",
    "perp",
    "scales",
    "bitfit",
    "full",
    "qat",
    "dequantize_train_requantize",
    "dora",
    "qa_lora",
    "svft",
    "serial_adapter",
    "parallel_adapter",
    "mam_adapter",
    "prefix_tuning",
    "prompt_tuning",
    "p_tuning",
    "pafi",
    "fish_mask",
    "diff_pruning",
    "qlora",
    "lq_lora",
    "loftq",
    "lota",
    "lr_qat",
]


def test_every_promised_method_is_a_row_of_both_tables():
    assert set(RECOVER) == set(PROMISED)
    for text in (methods_table(), kinds_table()):
        lines = [line for line in text.splitlines() if line.startswith("| `")]
        assert [line.split("`")[1] for line in lines] == list(RECOVER)
        assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_refusals_stand_in_the_table():
    lines = {line.split("`")[1]: line for line in kinds_table().splitlines() if line.startswith("| `")}
    cells = {name: dict(zip(KINDS, [c.strip() for c in line.split("|")[2:-1]], strict=True)) for name, line in lines.items()}
    assert cells["full"]["50 % pruned"] == "yes" and cells["full"]["3-bit"] == "refused"
    assert cells["qa_lora"]["2:4 + 4-bit"] == "refused" and cells["scales"]["2:4 + 4-bit"] == "yes"
    assert "put a decompose stage before it" in kinds_table()


def test_the_committed_tables_are_these():
    assert (Path(__file__).parents[2] / "recover" / "README.md").read_text(encoding="utf-8") == method_tables.document()
