"""Numbers for readers: how many digits, which unit, what stands where nothing was measured."""

import math

MISSING = "–"
MINUS = "−"


def number(value: object, digits: int = 4) -> str:
    """A number to `digits` significant digits with thousands separated; anything else as its text."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or value == 0:
        return _signed(f"{int(value):,}")
    if not 1e-4 <= abs(value) < 1e7:
        return _signed(f"{value:.{digits - 1}e}")
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _signed(f"{value:,.{places}f}")


def exact(value: object) -> str:
    """A number to six significant digits without trailing zeros, for measurements of unknown kind."""
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return number(value)
    return number(value) if isinstance(value, int) else _signed(f"{value:.6g}")


def ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}×" if value < 100 else f"{number(value, 4)}×"


def percent(value: float | None) -> str:
    if value is None:
        return MISSING
    return _signed(f"{100 * value:.1f} %" if abs(value) < 10 else f"{100 * value:,.0f} %")


def nats(value: float | None, places: int = 4) -> str:
    return MISSING if value is None else _signed(f"{value:+.{places}f}")


def size(value: int | float | None) -> str:
    """Decimal units, as budgets are written."""
    if value is None:
        return MISSING
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= size:
            return f"{number(value / size, 4 if abs(value) >= 10 * size else 3)} {unit}"
    return f"{int(value)} B"


def duration(value: float | None) -> str:
    if value is None:
        return MISSING
    if value < 10:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def difference(value: float | None, stderr: float | None) -> str:
    """`+0.0431 ± 0.0052`: a difference with one standard error."""
    if value is None:
        return MISSING
    places = 4 if max(abs(value), stderr or 0.0) >= 1e-3 else 6
    return nats(value, places) if stderr is None else f"{nats(value, places)} ± {stderr:.{places}f}"


def _signed(text: str) -> str:
    """A true minus sign, and none before a zero."""
    if not text.startswith("-"):
        return text
    return text.replace("-", MINUS, 1) if any(digit in text for digit in "123456789") else text[1:]
