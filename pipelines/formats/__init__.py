"""Checkpoints of other programs, in and out."""

from .registry import FORMATS, Format, detect, read, write

__all__ = ["FORMATS", "Format", "detect", "read", "write"]
