"""The tiny models of tests/formats, here too."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("formats_fixtures", Path(__file__).parents[1] / "formats" / "conftest.py")
assert _spec is not None and _spec.loader is not None
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)

case, on_grid, logits_of, tokens = _fixtures.case, _fixtures.on_grid, _fixtures.logits_of, _fixtures.tokens
