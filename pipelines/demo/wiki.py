"""MediaWiki XML to prose documents, streamed.

Knows the dump's schema and what of an article reads as prose. Does not know where the file came from, splits or tokens.
"""

import bz2
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote
from xml.etree import ElementTree

import mwparserfromhell
from mwparserfromhell.nodes import Heading, Tag, Wikilink
from mwparserfromhell.wikicode import Wikicode

MINIMUM_CHARACTERS = 1500
DROPPED_TAGS = frozenset(
    {"ref", "references", "table", "gallery", "math", "code", "syntaxhighlight", "source", "timeline", "imagemap", "score"}
)
DROPPED_NAMESPACES = ("file:", "image:", "category:", "media:", "template:")
APPARATUS = frozenset(
    {
        "see also",
        "references",
        "notes",
        "notes and references",
        "references and notes",
        "footnotes",
        "citations",
        "sources",
        "bibliography",
        "further reading",
        "external links",
    }
)
_INTERLANGUAGE = re.compile(r"^[a-z-]{2,12}:")
_SPACES = re.compile(r"[ \t\xa0]+")
_BLANKS = re.compile(r"\n\s*\n+")


@dataclass(frozen=True)
class Article:
    title: str
    url: str
    text: str


def articles(dump: Path | IO[bytes]) -> Iterator[Article]:
    """The dump's articles of the main namespace as prose; redirects, disambiguations and stubs under 1500 characters are left out."""
    with bz2.open(dump, "rb") as stream:
        for _, element in ElementTree.iterparse(stream):
            if _local(element.tag) != "page":
                continue
            fields = {_local(child.tag): child.text or "" for child in element.iter()}
            element.clear()
            if fields.get("ns") != "0" or _is_pointer(fields):
                continue
            text = prose(fields["text"])
            if len(text) >= MINIMUM_CHARACTERS:
                title = fields["title"]
                yield Article(title, "https://en.wikipedia.org/wiki/" + quote(title.replace(" ", "_")), text)


def prose(markup: str) -> str:
    """Running text of an article's wiki markup: no templates, tables, references, files, categories or apparatus sections."""
    code = mwparserfromhell.parse(markup, skip_style_tags=True)
    _drop_apparatus(code)
    for link in code.filter_wikilinks(recursive=True):
        if _is_furniture(link):
            _remove(code, link)
    for tag in code.filter_tags(recursive=True):
        if str(tag.tag).strip().lower() in DROPPED_TAGS:
            _remove(code, tag)
    text = str(code.strip_code(normalize=True, collapse=False, keep_template_params=False))
    text = re.sub(r"'{2,5}", "", text)
    text = re.sub(r"\([\s,;:]*\)", "", text)
    text = re.sub(r"\([\s,;:]+", "(", text)
    text = re.sub(r"(?m)^[ *#:;]+", "", _SPACES.sub(" ", text))
    text = re.sub(r" +([,.;:)])", r"\1", text)
    lines = (line.strip() for line in text.split("\n"))
    kept = "\n".join(line for line in lines if not line.startswith(("{|", "|", "!")))
    return _BLANKS.sub("\n\n", kept).strip()


def _drop_apparatus(code: Wikicode) -> None:
    """Remove sections that list sources and links instead of telling something."""
    for section in code.get_sections(levels=[2, 3], include_headings=True):
        headings = [node for node in section.nodes if isinstance(node, Heading)]
        if headings and headings[0].title.strip_code().strip().lower() in APPARATUS:
            _remove(code, section)


def _is_pointer(fields: dict[str, str]) -> bool:
    """Redirects and disambiguation pages lead elsewhere and hold no prose."""
    return "redirect" in fields or fields.get("text", "").lstrip().lower().startswith("#redirect") or "(disambiguation)" in fields["title"]


def _is_furniture(link: Wikilink) -> bool:
    title = str(link.title).strip().lower()
    return title.startswith(DROPPED_NAMESPACES) or (link.text is None and _INTERLANGUAGE.match(title) is not None)


def _remove(code: Wikicode, node: Wikicode | Wikilink | Tag) -> None:
    """Remove a node; one inside an already removed part is gone as well."""
    try:
        code.remove(node)
    except ValueError:
        return


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
