"""MediaWiki dumps made by hand."""

import bz2
from pathlib import Path


def page(title: str, text: str, namespace: int = 0, redirect: bool = False) -> str:
    arrow = '<redirect title="Elsewhere" />' if redirect else ""
    return f"<page><title>{title}</title><ns>{namespace}</ns>{arrow}<revision><text>{text}</text></revision></page>"


def write_dump(path: Path, pages: list[str]) -> Path:
    xml = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">' + "".join(pages) + "</mediawiki>"
    path.write_bytes(bz2.compress(xml.encode()))
    return path
