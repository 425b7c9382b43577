"""YAML as configs use it: plain values only, without the traps of YAML 1.1.

`1e-3` and `16_384` are numbers; `yes`, `010`, `1:30` and `2024-01-01` are text. Dumped text is quoted where YAML 1.1
would read it as something else.
"""

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
MERGE = _TAG + "merge"
NULL = _TAG + "null"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as PyYAML declares it)


class _Dumper(yaml.SafeDumper):
    """Writes sections as blocks and lists on one line."""


_BOOL = re.compile(r"(true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)$")
_FLOAT = re.compile(
    r"""[-+]? (?: (?:0|[1-9][0-9_]*) (?: \.[0-9_]* (?:[eE][-+]?[0-9]+)? | [eE][-+]?[0-9]+ )
              |   \.[0-9][0-9_]* (?:[eE][-+]?[0-9]+)?
              |   \.inf )$
      | \.nan$""",
    re.VERBOSE,
)
_Loader.add_implicit_resolver(NULL, re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_TAG + "bool", _BOOL, list("tTfF"))
_Loader.add_implicit_resolver(_TAG + "int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))
_Loader.add_implicit_resolver(MERGE, re.compile(r"<<$"), ["<"])
_Dumper.add_implicit_resolver(_TAG + "float", _FLOAT, list("-+.0123456789"))  # in addition to YAML 1.1's
_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence(_TAG + "seq", data, flow_style=True))


def compose(text: str) -> yaml.Node | None:
    """The root node of a document, or None if it is empty. Nodes know their lines.

    Raises:
        yaml.YAMLError: if the text is not a single YAML document.
    """
    node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    return node


def scalar(node: yaml.ScalarNode) -> bool | int | float | str | None:
    """The value of a scalar.

    Raises:
        ValueError: if it has an explicit tag that is not one of plain values or does not match the text.
    """
    text: str = node.value
    match node.tag.removeprefix(_TAG):
        case "null":
            return None
        case "bool" if _BOOL.match(text):
            return text.lower() == "true"
        case "int" if _INT.match(text):
            return int(text.replace("_", ""))
        case "float" if _FLOAT.match(text):
            value = float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
            return int(value) if "." not in text and value.is_integer() else value  # 1e5 images
        case "str" | "merge":
            return text
        case _:
            raise ValueError(f"has a tag that does not match its value, {node.tag.replace(_TAG, '!!')}; remove the tag")


def dump(values: dict[str, Any]) -> str:
    """Nested plain values as YAML, in the given order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
