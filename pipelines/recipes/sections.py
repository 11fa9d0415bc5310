"""The sections of a recipe beside its stages: where text comes from, and how much of it calibrates and is measured. Knows text and numbers only."""

from typing import Annotated

from annotated_types import MinLen, doc
from pydantic import BaseModel, ConfigDict

from ...compress.ranges import Count, Tokens

Source = Annotated[str, MinLen(1), doc("demo, a file or a datasets id")]
Model = Annotated[str, MinLen(1), doc("demo, a directory, a .gguf file or a Hub id")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Data(Section):
    """Where text comes from: `demo`, a .txt/.raw/.md/.jsonl/.parquet file or a `datasets` id."""

    calibration: Source = "demo"
    train: Source = "demo"
    evaluation: Source = "demo"


class Calibration(Section):
    samples: Count = 128
    seq_len: Tokens = 2048


class Evaluation(Section):
    """`windows` None means all that the text holds."""

    seq_len: Tokens = 2048
    windows: Count | None = None
