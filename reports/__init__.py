"""Metrics in; tables, pages and figures out. `render` is what the command line calls."""
