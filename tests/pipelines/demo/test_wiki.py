"""What is left of an article's markup, and which pages of a dump are articles."""

from pathlib import Path

from bitmend.pipelines.demo.wiki import articles, prose

from ..dumps import page, write_dump

MARKUP = """{{Infobox river|length=12|name={{lang|fr|Ru}}}}
[[File:Map.png|thumb|A map of the [[valley]]]]
The '''Ru''' ({{IPA|ry}}; French for ''stream'') is a [[river]] in the [[Valley of Stones|valley]].<ref>{{cite book|title=Rivers}}</ref> It is &mdash; so they say &mdash; cold.

{| class="wikitable"
! Year !! Floods
|-
| 1910 || 3
|}
== Course ==
* It rises near [http://example.org/hill the hill].
* It ends in the sea.<ref name="sea" />

=== Mouth ===
Wide and slow.

== See also ==
* [[Other rivers]]

== External links ==
* [http://example.org A site]

[[Category:Rivers]]
[[fr:Ru]]
"""


def test_prose_keeps_sentences_and_drops_the_furniture():
    assert prose(MARKUP) == (
        "The Ru (French for stream) is a river in the valley. It is — so they say — cold.\n\n"
        "Course\nIt rises near the hill.\nIt ends in the sea.\n\nMouth\nWide and slow."
    )


def test_only_articles_with_enough_prose_are_taken(tmp_path: Path):
    long = "A sentence of the article. " * 80
    dump = write_dump(
        tmp_path / "dump.bz2",
        [
            page("Stone bridge", long),
            page("Short", "Little to say."),
            page("Talk:Stone bridge", long, namespace=1),
            page("Old bridge", long, redirect=True),
            page("Older bridge", "#REDIRECT [[Stone bridge]] " + long),
            page("Bridge (disambiguation)", long),
        ],
    )
    actual = list(articles(dump))
    assert [article.title for article in actual] == ["Stone bridge"]
    assert actual[0].url == "https://en.wikipedia.org/wiki/Stone_bridge"
    assert actual[0].text == long.strip()
