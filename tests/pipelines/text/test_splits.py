"""Parts are disjoint, the split does not depend on order, and evaluation text is found in whatever shape it hides."""

import pytest
from bitmend.pipelines.text.splits import PARTS, SHARES, Document, Exclusion, normalised_hash, split_documents
from hypothesis import given
from hypothesis import strategies as st

WORDS = [
    "the",
    "weight",
    "of",
    "a",
    "river",
    "is",
    "more",
    "than",
    "its",
    "water",
    "and",
    "less",
    "than",
    "the",
    "sound",
    "of",
    "all",
    "its",
    "stones",
]


def document(seed: int, words: int = 60) -> Document:
    return Document(
        " ".join(WORDS[(seed * 7 + k * (seed % 5 + 1)) % len(WORDS)] + str((seed * k) % 11) for k in range(words)) + f" no {seed}"
    )


def many(count: int) -> list[Document]:
    return [document(seed, 40 + seed % 30) for seed in range(count)]


def test_parts_are_disjoint_complete_and_near_their_shares():
    documents = many(200)
    parts, rule = split_documents(documents, PARTS)
    assert rule == "documents by hash"
    assert sorted(d.text for part in parts.values() for d in part) == sorted(d.text for d in documents)
    total = sum(len(d.text) for d in documents)
    for part in PARTS:
        assert abs(sum(len(d.text) for d in parts[part]) / total - SHARES[part]) < 0.02


@given(st.permutations(range(30)))
def test_the_split_does_not_depend_on_the_order_of_documents(order: list[int]):
    documents = many(30)
    straight, _ = split_documents(documents, PARTS)
    shuffled, _ = split_documents([documents[index] for index in order], PARTS)
    for part in PARTS:
        assert {d.text for d in straight[part]} == {d.text for d in shuffled[part]}


def test_duplicates_stay_in_one_part_even_with_other_case_and_spaces():
    documents = many(40)
    copies = [Document(d.text.upper().replace(" ", "  \n")) for d in documents]
    parts, _ = split_documents(documents + copies, PARTS)
    hashes = {part: {normalised_hash(d.text) for d in parts[part]} for part in PARTS}
    for first in PARTS:
        for second in PARTS:
            assert first == second or not hashes[first] & hashes[second]
    assert sum(len(part) for part in parts.values()) == 80


@given(st.integers(8, 20), st.lists(st.sampled_from(PARTS), min_size=2, max_size=4, unique=True))
def test_every_role_gets_a_document(count: int, roles: list[str]):
    parts, _ = split_documents(many(count), roles)
    assert set(parts) == set(roles) and all(parts.values())


def test_a_role_alone_gets_everything_in_order():
    documents = many(5)
    parts, rule = split_documents(documents, ["evaluation"])
    assert parts == {"evaluation": documents} and rule == "whole"


def test_one_huge_document_is_cut_into_contiguous_regions_at_line_ends():
    text = "\n".join(document(seed).text for seed in range(300))
    parts, rule = split_documents([Document(text)], PARTS)
    assert rule == "contiguous regions"
    regions = [parts[part][0].text for part in reversed(PARTS)]
    assert "".join(regions) == text
    assert all(region.endswith("\n") for region in regions[:-1])
    for part in PARTS:
        assert abs(len(parts[part][0].text) / len(text) - SHARES[part]) < 0.03


def test_one_dominating_document_is_cut_although_there_are_many():
    documents = [*many(20), Document("\n".join(document(seed).text for seed in range(300)))]
    _, rule = split_documents(documents, PARTS)
    assert rule == "contiguous regions"


def test_too_few_answers_to_split_are_refused_with_the_numbers():
    documents = [Document("question answer", ((9, 15),)), Document("question reply", ((9, 14),))]
    with pytest.raises(ValueError, match="2 distinct documents cannot be split into 4 parts"):
        split_documents(documents, PARTS)


def test_exclusion_drops_equal_documents_and_those_mostly_made_of_excluded_lines():
    line = document(1).text
    exclusion = Exclusion.of([Document(line), document(2)])
    kept, dropped, cut = exclusion.applied([document(2), Document(line + "\nshort tail"), document(3)])
    assert [d.text for d in kept] == [document(3).text]
    assert (dropped, cut) == (2, 0)


def test_exclusion_cuts_single_lines_out_of_a_long_document():
    line = document(1).text
    host = "\n".join([document(4).text, line.title(), document(5).text, document(6).text])
    kept, dropped, cut = Exclusion.of([Document(line)]).applied([Document(host)])
    assert (dropped, cut) == (0, 1)
    assert kept[0].text == "\n".join([document(4).text, document(5).text, document(6).text])


def test_exclusion_leaves_short_common_lines_alone():
    kept, dropped, cut = Exclusion.of([Document("See the map.\n" + document(1).text)]).applied(
        [Document("See the map.\n" + document(2).text)]
    )
    assert (len(kept), dropped, cut) == (1, 0, 0)


def test_a_conversation_with_an_excluded_line_goes_as_a_whole():
    line = document(1).text
    answer = Document(document(2).text + "\n" + document(3).text + "\n" + line, ((0, 5),))
    assert Exclusion.of([Document(line)]).applied([answer]) == ([], 1, 0)
