"""Show the comments of dataclass and named-tuple fields in the reference, like docstrings."""

from __future__ import annotations

import ast
import re
from typing import Any

import griffe


class FieldComments(griffe.Extension):
    """Adds an `Attributes` section to the docstring of a class whose fields have comments."""

    def on_class_members(self, *, node: ast.AST | griffe.ObjectNode, cls: griffe.Class, **_: Any) -> None:
        """Read the comments from the source code."""
        if cls.docstring is None or not isinstance(node, ast.ClassDef) or "Attributes:" in cls.docstring.value:
            return
        explained = {name: _comment(field.lines) for name, field in cls.attributes.items() if not field.docstring}
        lines = [f"    {name}: {comment}" for name, comment in explained.items() if comment]
        if lines:
            cls.docstring.value += "\n\nAttributes:\n" + "\n".join(lines)


def _comment(lines: list[str]) -> str:
    """Return the comment of a field, which may span several lines."""
    found = [match[1].strip() for line in lines if (match := re.search(r"\s# (.+)", line))]
    return " ".join(found)
