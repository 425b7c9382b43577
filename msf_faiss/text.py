"""Strings that any file, page or terminal can show."""

from pathlib import Path


def printable(name: str | Path) -> str:
    r"""A file name that may not be valid UTF-8, as text that is: a stray byte 0xff becomes `\udcff`."""
    return str(name).encode(errors="backslashreplace").decode()


def replace_unprintable(text: str) -> str:
    """`text` on one line: control characters, which could steer a terminal, become U+FFFD."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)
