"""The table of recovery methods for the documentation, written from their rows."""

from collections.abc import Iterable

from .methods import RECOVER, refusal

COLUMNS = ("method", "trains", "stored as", "fused as", "exported as", "merges into", "mask safe", "grid safe", "learning rate")
KINDS: dict[str, frozenset[str]] = {
    "dense": frozenset({"dense"}),
    "50 % pruned": frozenset({"dense", "masked"}),
    "3-bit": frozenset({"uniform"}),
    "NF4": frozenset({"normal_float", "double_quantized"}),
    "2:4 + 4-bit": frozenset({"uniform", "masked"}),
    "LQ": frozenset({"uniform", "low_rank"}),
}


def methods_table() -> str:
    """Markdown: one row a method, from training to export."""
    from .trainable import RATES

    rows = []
    for name, row in RECOVER.items():
        ways = row.ways
        safe = ("yes" if row.mask_safe else "no", "codes held" if row.grid_safe else "codes move")
        rows.append(
            (f"`{name}`", row.trains, ways.stored_as, ways.fused_as, ways.exports_as, ways.merges_into, *safe, f"{RATES[row.main]:g}")
        )
    return _markdown(COLUMNS, rows)


def kinds_table() -> str:
    """Markdown: which method serves which kind of compressed model; a refusal is given with its reason below."""
    rows, reasons = [], []
    for name in RECOVER:
        cells = []
        for kind in KINDS.values():
            reason = refusal(name, [kind], {})
            cells.append("yes" if reason is None else "refused")
            if reason is not None and reason not in reasons:
                reasons.append(reason)
        rows.append((f"`{name}`", *cells))
    return _markdown(("method", *KINDS), rows) + "\n" + "\n".join(f"- {reason}" for reason in reasons) + "\n"


def _markdown(head: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
