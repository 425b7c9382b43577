"""A config from a text and overrides, or its problems."""

import pytest

from msf_faiss.config import Config
from msf_faiss.config.draft import Draft
from msf_faiss.errors import UserError


def parse(text: str, *overrides: str) -> Config:
    """The config in the file my.yaml with this text."""
    draft = Draft()
    draft.read(text, "my.yaml")
    draft.override(overrides)
    return draft.finish()


def problems(text: str, *overrides: str) -> list[str]:
    """One line per problem."""
    with pytest.raises(UserError) as caught:
        parse(text, *overrides)
    heading, *lines = str(caught.value).split("\n  ")
    assert heading == ("the config has a problem:" if len(lines) == 1 else f"the config has {len(lines)} problems:")
    return lines
