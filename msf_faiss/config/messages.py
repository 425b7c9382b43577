"""Messages for the errors that pydantic finds in a config: what is wrong with a key, and what to do."""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from msf_faiss.config.sections import SECTIONS, Key, dotted

_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list, such as [1, 2]",
    "model": "a section with keys",
    "dict": "a section with keys",
}


def explain(key: Key, errors: Sequence[ErrorDetails]) -> str:
    """What is wrong with the value at `key`, and what to do; several errors are those of alternative types."""
    first = errors[0]
    found = first["input"]
    match first["type"]:
        case "extra_forbidden":
            return unknown_key(key, first["loc"])
        case "missing":
            if isinstance(key[-1], int):
                return "is missing; the list needs more entries"
            return f"is required; add it to the file, or pass --set {dotted(key)}=…"
        case "rule":
            return str(first["ctx"]["problem"])
        case "union_tag_invalid" | "union_tag_not_found":
            kinds, found = list(SECTIONS[key].models), found["kind"]
            return f"must be {_or(kinds)}, found {_show(found)}{_did_you_mean(found, kinds)}"
    expected = _or(list(dict.fromkeys(_expected(error) for error in errors)))
    words = [word for error in errors if error["type"] == "literal_error" for word in _literals(error)]
    if first["type"] in {"int_type", "float_type"} and isinstance(found, str) and re.fullmatch(r"[-+.\d]+", found):
        return f"must be {expected}, found {_show(found)}; write it without quotes or leading zeros"
    return f"must be {expected}, found {_show(found)}{_did_you_mean(found, words)}"


def _expected(error: ErrorDetails) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        word, name = _BOUNDS[kind]
        return f"{word} {context[name]}"
    if kind == "literal_error":
        return _or(_literals(error))
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    if kind == "too_long":
        return f"a list of {context['max_length']}"
    return _TYPES.get(kind.partition("_")[0], str(error["msg"]).removeprefix("Input should be "))


def unknown_key(key: Key, location: Sequence[str | int] = ()) -> str:
    """What to do about a key that does not exist; pydantic's `location` tells the kind of its section."""
    name, section = str(key[-1]), SECTIONS[key[:-1]]
    kind = str(location[len(key) - 1]) if section.is_union and location else None
    if name in section.names():
        others = [other for other in section.models if name in section.names(other)]
        kind_key = dotted((*key[:-1], "kind"))
        return f"kind {kind} has no such key, only {_or(others, 'and')}; change {kind_key} or remove the key"
    head, _, rest = name.partition(".")
    if rest and (*key[:-1], head) in SECTIONS:
        return f"no such key; write {rest} inside the section {head}"
    if (name,) in SECTIONS:
        return f"no such key; {name} is a section at the top level"
    names = section.names(kind)
    return "no such key" + (_did_you_mean(name, names) or f"; the keys here are {', '.join(names)}")


def _literals(error: ErrorDetails) -> list[str]:
    """The allowed values, from pydantic's \"'a', 'b' or 'c'\"."""
    return [name.strip("' ") for name in error["ctx"]["expected"].replace(" or ", ", ").split(",")]


def _did_you_mean(found: Any, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(found), list(allowed), 1)
    return f"; did you mean {close[0]}?" if close else ""


def _or(words: Sequence[str], conjunction: str = "or") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {conjunction} {words[-1]}"


def _show(value: Any) -> str:
    """A value as in YAML, or what it is."""
    return "a section" if isinstance(value, dict) else json.dumps(value, ensure_ascii=False)
