"""The comment behind a field of a dataclass or named tuple explains it: the reference shows it like a docstring."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Adds a section `Attributes` to the docstring of a class whose fields have comments."""

    def on_class_members(self, *, node: ast.AST | griffe.ObjectNode, cls: griffe.Class, **_: Any) -> None:
        """Read the comments from the source."""
        if cls.docstring is None or not isinstance(node, ast.ClassDef) or "Attributes:" in cls.docstring.value:
            return
        explained = {name: _comment(field.lines) for name, field in cls.attributes.items() if not field.docstring}
        lines = [f"    {name}: {comment}" for name, comment in explained.items() if comment]
        if lines:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)


def _comment(lines: list[str]) -> str:
    """What stands behind a field, which may go on over several lines."""
    found = [match[1].strip() for line in lines if (match := re.search(r"\s# (.+)", line))]
    return " ".join(found)
