"""The tiny models of the formats' tests, here too."""

from ..pipelines.formats.conftest import case, logits_of, on_grid, tokens

__all__ = ["case", "logits_of", "on_grid", "tokens"]
