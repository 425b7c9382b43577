from pathlib import Path

from msf_faiss.text import printable, replace_unprintable


def test_printable_escapes_invalid_utf8() -> None:
    assert printable(Path("chat-\udcff-é.jpg")) == "chat-\\udcff-é.jpg"


def test_control_characters_are_replaced() -> None:
    assert replace_unprintable("a\nb\x1b[2J é") == "a\ufffdb\ufffd[2J é"
