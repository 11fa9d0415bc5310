"""Metrics in; tables, pages and figures out. `render`, `show` and `compare` are what the command line calls."""

from .render import compare, render, show

__all__ = ["compare", "render", "show"]
