"""What all sections of the config are made of: their base class, and types of values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError


def _expand_home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:  # ~name without a user of that name: a file whose name starts with ~
        return path


_MEMORY = r"^\d+(\.\d+)?(MiB|GiB|TiB|MB|GB|TB)$"


def _check_memory(value: object) -> object:
    if isinstance(value, str) and re.match(_MEMORY, value):
        return value
    raise PydanticCustomError("memory", "an amount of memory such as 8GiB")


def broken_rule(problem: str, *keys: str) -> PydanticCustomError:
    """The error of a rule between `keys`, dotted names within the section; `problem` is said of the first."""
    return PydanticCustomError("rule", "{key}: {problem}", {"key": keys[0], "problem": problem, "keys": keys})


UserPath = Annotated[Path, AfterValidator(_expand_home)]
Fraction = Annotated[float, Field(ge=0, le=1)]
AboveZero = Annotated[float, Field(gt=0)]
Positive = Annotated[int, Field(ge=1)]
Memory = Annotated[str, Field(pattern=_MEMORY), BeforeValidator(_check_memory)]


class Section(BaseModel):
    """Base of all sections: immutable, and unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
