import pytest
from bitmend.reports import json_values as j


@pytest.mark.parametrize(
    ("narrow", "value"),
    [
        (j.mapping, {"a": 1}),
        (j.sequence, [1, "b"]),
        (j.mappings, [{"a": 1}, {}]),
        (j.integer, 3),
        (j.real, 3),
        (j.real, 0.5),
        (j.text, "a"),
    ],
)
def test_what_has_the_type_comes_back_as_it_is(narrow, value) -> None:
    assert narrow(value) == value


@pytest.mark.parametrize(
    ("narrow", "value", "says"),
    [
        (j.mapping, [1], "object of JSON is expected, not \\[1\\]"),
        (j.sequence, "text", "array of JSON is expected, not 'text'"),
        (j.mappings, [{}, None], "object of JSON is expected, not None"),
        (j.integer, True, "whole number is expected, not True"),
        (j.integer, 1.0, "whole number is expected, not 1.0"),
        (j.real, False, "number is expected, not False"),
        (j.text, 7, "string is expected, not 7"),
        (j.text, list(range(99)), "…$"),
    ],
)
def test_anything_else_is_refused_and_shown(narrow, value, says) -> None:
    with pytest.raises(ValueError, match=says):
        narrow(value)
