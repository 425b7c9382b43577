from typing import Any

import pytest
import yaml

from msf_faiss.config.yaml_subset import compose, dump, scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1_000", 1000), ("-7", -7), ("1e3", 1000), ("0", 0)],
        *[("1e-3", 1e-3), ("5E-4", 5e-4), (".5", 0.5), ("1.", 1.0), (".inf", float("inf"))],
        *[("true", True), ("False", False), ("~", None), ("null", None), ("", None)],
        *[(text, text) for text in ("yes", "no", "010", "1:30", "2024-01-01", "0x10", "1e", "_1", "e5", "1.2.3")],
        *[('"5"', "5"), ("!!str 5", "5")],
    ],
)
def test_scalar(text: str, value: object) -> None:
    node = compose(f"a: {text}")
    assert isinstance(node, yaml.MappingNode)
    found = scalar(node.value[0][1])
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("text", ["!!int x", "!!float no", "!!bool 1", "!!python/name:os.system", "!mine 3"])
def test_scalar_refuses_other_tags(text: str) -> None:
    node = compose(text)
    assert isinstance(node, yaml.ScalarNode)
    with pytest.raises(ValueError, match=r"has a tag that does not match its value, !.*; remove the tag"):
        scalar(node)


def test_compose_returns_none_for_an_empty_document() -> None:
    assert compose("# only a comment\n") is None


def test_dump_writes_sections_as_blocks_and_lists_on_one_line() -> None:
    values: dict[str, Any] = {"b": {"c": [1, 2.5], "a": None}, "d": "x" * 200}
    assert dump(values) == f"b:\n  c: [1, 2.5]\n  a: null\nd: {'x' * 200}\n"


@pytest.mark.parametrize(
    "value", ["1e5", "1e-5", "null", "yes", "010", "12", "1:30", "a: b", "it's", "# x", "ä/日本", "x\ny"]
)
def test_dumped_text_is_text_for_yaml_1_1_too(value: str) -> None:
    assert yaml.safe_load(dump({"a": value})) == {"a": value}
