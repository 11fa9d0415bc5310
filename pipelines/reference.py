"""What `make publish` measures: the reference tables by name; `publishing` measures their rows."""

from .reference_compress import COMPRESS, DECOMPOSE
from .reference_recover import GRID, PERP, RECOVER_NOTE, recover_rows
from .reference_rows import Table


def tables() -> dict[str, Table]:
    """All reference tables by name; `recover` reads its methods from their registry."""
    recover = Table(
        "Recovery: every method on every kind of compressed model",
        recover_rows(),
        ("kind", "seed"),
        panel="kind",
        within=("kind",),
        notes=(RECOVER_NOTE,),
    )
    return {"compress": COMPRESS, "decompose": DECOMPOSE, "recover": recover, "perp": PERP, "grid": GRID}
