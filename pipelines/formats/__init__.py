"""Checkpoints of other programs, in and out."""

from .registry import FORMATS, Format, detect, is_pair, read, read_back, write

__all__ = ["FORMATS", "Format", "detect", "is_pair", "read", "read_back", "write"]
