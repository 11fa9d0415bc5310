"""The tables of recovery methods in recover/README.md, written from their rows: `python -m bitmend.recover.method_tables > recover/README.md`."""

from collections.abc import Iterable

from .recovery_methods import RECOVER, refusal
from .trainable import RATES

COLUMNS = ("method", "trains", "stored as", "fused as", "exported as", "merges into", "mask safe", "grid safe", "learning rate")
KINDS: dict[str, frozenset[str]] = {
    "dense": frozenset({"dense"}),
    "50 % pruned": frozenset({"dense", "masked"}),
    "3-bit": frozenset({"uniform"}),
    "NF4": frozenset({"normal_float", "double_quantized"}),
    "Q4_K": frozenset({"ggml"}),
    "2:4 + 4-bit": frozenset({"uniform", "masked"}),
    "LQ": frozenset({"uniform", "low_rank"}),
}


def methods_table() -> str:
    """Markdown: one row a method, from training to export."""
    rows = []
    for name, row in RECOVER.items():
        ways = row.ways
        safe = ("yes" if row.mask_safe else "no", "codes held" if row.grid_safe else "codes move")
        rows.append(
            (
                f"`{name}`",
                f"{row.trains} ({row.departs})" if row.departs else row.trains,
                ways.stored_as,
                ways.fused_as,
                ways.exports_as,
                ways.merges_into,
                *safe,
                f"{RATES[row.main]:g}",
            )
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


def document() -> str:
    """The whole of recover/README.md."""
    return f"""# Recovery methods

Written by `python -m bitmend.recover.method_tables > recover/README.md` from the rows in `recover/recovery_methods.py`; a test compares. `pipeline list`
prints every setting with its default, and every method takes `targets` (`all`, roles q k v o gate up down, or a regex) and `layers` (`all`,
`first:k`, `middle:k`, `last:k`, or block numbers). The fused experts of a mixture are linears like all others, each under its own name
(`….experts.down_proj.3`, role down), but have no place for biases or bottlenecks: a note in the report names what was left alone.

## From training to export

What a plan can know is refused before any work; an export is refused before anything is written. "as it was stored" means that the next
stages see nothing new.

{methods_table()}
What every method keeps: masked weights stay exactly 0 and masks are what they were, codes too where the table says so; an audit after
each recovery, merge and export reads both back from disk and fails the run otherwise. The best held-out values are kept, the start among
them, in the form in which they are stored; what did not help is not kept at all.

The learning rate is that of the method's main parameters; what trains with them keeps its ratio to it (`RATES` in `recover/trainable.py`).
Scales move relative to themselves, norms in units of their gain (at {RATES["norms_with_others"]:g} next to weights or factors), codes in grid steps.
A low-rank factor in 16 bits trains value by value; one on a grid (`factor_bits` 4 or 8) keeps its codes and trains its scales. `lora` with
`scales: true` trains the scales of the quantized weights with either.

`reconstruct` trains what `train` names (`mask_lora`, `weights`, `norms`, `biases`, `scales`, `lora`; `auto`: scales on a grid, mask_lora
elsewhere) block by block and needs the memory of one block. Adapters can be pruned after training: `prune_ranks`, `prune_units`.

## Which compressed model each method serves

{kinds_table()}"""


if __name__ == "__main__":
    print(document(), end="")
