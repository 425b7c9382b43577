"""What pydantic found wrong with a config, in the words of its user."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from msf_faiss.config import Config

_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list, as in [1, 2]",
    "model": "a section with keys of its own",
    "dict": "a section with keys of its own",
}


def explain(key: Sequence[str | int], errors: Sequence[ErrorDetails]) -> str:
    """What is wrong with the value at `key`, and what instead; several errors are those of alternatives."""
    first = errors[0]
    kind = first["type"]
    if kind == "extra_forbidden":
        return _unknown(str(key[-1]), _siblings(key, first))
    if kind == "missing" and isinstance(first["loc"][-1], int):
        return f"needs more entries, at least {first['loc'][-1] + 1}"
    if kind == "missing":
        name = ".".join(map(str, key))
        return f"is required; write it into the file, or add --set {name}=…"
    if kind == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    found = first["input"]
    if kind == "union_tag_invalid":
        context = first["ctx"]
        return _choice([name.strip(" '") for name in context["expected_tags"].split(",")], context["tag"])
    alternatives = " or ".join(dict.fromkeys(_expected(error) for error in errors))
    close = [match for error in errors if error["type"] == "literal_error" for match in _close(found, _literals(error))]
    return f"must be {alternatives}, found {_show(found)}" + (f"; did you mean {close[0]}?" if close else "")


def _expected(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"{word} {context[name]}"
    if kind == "literal_error":
        return _or(_literals(error))
    if kind in {"too_short", "too_long"}:
        most_or_least = f"at least {context['min_length']}" if kind == "too_short" else f"{context['max_length']}"
        return f"a list of {most_or_least}"
    return _KINDS.get(kind.split("_")[0], str(error["msg"]).removeprefix("Input should be "))


def _choice(allowed: Sequence[str], found: Any) -> str:
    close = _close(found, allowed)
    return f"must be {_or(allowed)}, found {_show(found)}" + (f"; did you mean {close[0]}?" if close else "")


def _unknown(name: str, allowed: Sequence[str]) -> str:
    close = _close(name, allowed)
    return "no such key; " + (f"did you mean {close[0]}?" if close else f"the keys here are {', '.join(allowed)}")


def _siblings(key: Sequence[str | int], error: ErrorDetails) -> list[str]:
    """The keys that stand beside `key` in the model; `error` names the member of each union on the way."""
    model: Any = Config
    for part in error["loc"][:-1]:
        members = _members(model)
        if part in members:
            model = members[str(part)]
        elif isinstance(model, type) and issubclass(model, BaseModel) and part in model.model_fields:
            field = model.model_fields[str(part)]
            model = field.annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _members(union: Any) -> dict[str, type[BaseModel]]:
    """The models of a union of sections, by their kind."""
    return {
        kind: model
        for model in getattr(union, "__args__", ())
        if isinstance(model, type) and issubclass(model, BaseModel)
        for kind in getattr(model.model_fields["kind"].annotation, "__args__", ())
    }


def _literals(error: ErrorDetails) -> list[str]:
    """What a literal may be, from pydantic's \"'a', 'b' or 'c'\"."""
    return [name.strip("' ") for name in error["ctx"]["expected"].replace(" or ", ", ").split(",")]


def _close(found: Any, allowed: Iterable[str]) -> list[str]:
    return difflib.get_close_matches(str(found), list(allowed), 1)


def _or(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _show(value: Any) -> str:
    """A value as the user would write it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_show(item) for item in value)}]"
    return repr(value) if isinstance(value, str) else str(value)
