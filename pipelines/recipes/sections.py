"""The sections of a recipe other than its stages: data, calibration and evaluation. Knows text and numbers only."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

from annotated_types import MinLen, doc
from pydantic import BaseModel, ConfigDict, field_validator
from pydantic_core import PydanticCustomError

from ...compress.ranges import Count, Tokens
from .fields import CHECKED
from .mixture import SELF, parse_mixture

T = TypeVar("T")
Source = Annotated[str, MinLen(1), doc("wiki, news, code, docs, a file, a datasets id, or a mixture of them")]
Model = Annotated[str, MinLen(1), doc("demo, a directory, a .gguf file or a Hub id")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    """Where text comes from: `wiki` (also `demo`), `news`, `code`, `docs` (of a library), a .txt/.raw/.md/.jsonl/.parquet file or a `datasets` id; calibration
    and training may mix several (`mixture.parse_mixture`), among them `self`, what the dense model writes."""

    calibration: Source = "demo"
    train: Source = "demo"
    evaluation: Source = "demo"

    @field_validator("calibration", "train")
    @classmethod
    def _mixture(cls, text: str) -> str:
        return _checked(text, parse_mixture)

    @field_validator("evaluation")
    @classmethod
    def _one_source(cls, text: str) -> str:
        return _checked(text, _evaluated)


class Calibration(Section):
    samples: Count = 128
    seq_len: Tokens = 2048


class Evaluation(Section):
    """`windows` None means all that a text holds. `also`: other texts, measured after every stage in addition to that of `data.evaluation`. `tasks`: what
    lm-eval scores after every stage, with the whole model in memory; `task_limit`: the first so many documents of each, None for all."""

    seq_len: Tokens = 2048
    windows: Count | None = None
    also: Annotated[list[Source], doc("names of texts, files or datasets ids")] = []
    tasks: Annotated[list[Annotated[str, MinLen(1)]], doc("lm-eval's names of tasks, or .jsonl files of multiple choice")] = []
    task_limit: Count | None = None

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, tasks: list[str]) -> list[str]:
        return _checked(tasks, _once)

    @field_validator("also")
    @classmethod
    def _texts(cls, also: list[str]) -> list[str]:
        return _checked(also, _named_apart)


def text_name(source: str) -> str:
    """What a report calls an evaluation text: a file by its own name."""
    return Path(source).name


def _evaluated(text: str) -> None:
    if len(parse_mixture(text)) > 1 or text == SELF:
        raise ValueError("one text that the model did not write; put further ones into evaluation.also")


def _named_apart(also: list[str]) -> None:
    for source in also:
        _evaluated(source)
    names = [text_name(source) for source in also]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two texts are called {twice[0]!r}")


def _once(tasks: list[str]) -> None:
    if twice := [name for name in tasks if tasks.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")


def _checked(value: T, check: Callable[[T], object]) -> T:
    """The value, checked; the message of a ValueError is shown to the user."""
    try:
        check(value)
    except ValueError as error:
        raise PydanticCustomError(CHECKED, "{words}", {"words": str(error)}) from error
    return value
