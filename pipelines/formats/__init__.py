"""Checkpoints of other programs, in and out."""

from .registry import FORMATS, Format, base_directory, detect, is_pair, read, write

__all__ = ["FORMATS", "Format", "base_directory", "detect", "is_pair", "read", "write"]
