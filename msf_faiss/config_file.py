"""Configs as YAML files and `--set` overrides: read with every problem reported at once, written to be read again.

Numbers are what people mean (`1e-3` and `16_384` are numbers; `010`, `yes` and `2024-01-01` are text), a key may stand
only once, and a section that is left empty has its defaults. Paths are relative to the working directory.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from msf_faiss.config import Config
from msf_faiss.config_words import explain
from msf_faiss.errors import UserError

Key = tuple[str | int, ...]  # ("views", "weak", "crop_scale", 0)

_SUFFIXES = (".yaml", ".yml")
_NULL, _MERGE = "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


def load_config(reference: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, or of a shipped name, with overrides.

    Args:
        reference: a path, or the name of a shipped config; None: "demo". What has a separator or an ending is a path.
        overrides: "dotted.key=value", later ones win; the value is read as in YAML. Setting `data.kind` or
            `model.backbone.kind` to another kind starts that section afresh, but for what all kinds have in common; a
            mapping, as in views={size: 64}, replaces a whole section.

    Raises:
        UserError: with a line for every problem: place, key, what is wrong, what instead.
    """
    name, text = _find("demo" if reference is None else reference)
    draft = _Draft()
    draft.read(text, name)
    return draft.finish(overrides)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with overrides, as `load_config` applies them to a file.

    Raises:
        UserError: with a line for every problem.
    """
    draft = _Draft()
    draft.values = config.model_dump(mode="json")
    return draft.finish(overrides)


def dump_config(config: Config) -> str:
    """The complete config as YAML; loading it gives an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def config_schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "msf-faiss config"}


def shipped_configs() -> dict[str, str]:
    """What each shipped config is for, the first line of its header, by name."""
    folder = resources.files("msf_faiss_configs")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(_SUFFIXES))
    headers = {name: (folder / name).read_text(encoding="utf-8").partition("\n")[0] for name in names}
    return {name.rpartition(".")[0]: header.removeprefix("# ") for name, header in headers.items()}


def _find(reference: str | Path) -> tuple[str, str]:
    """The name to report problems under, and the text."""
    path = Path(reference).expanduser()
    is_path = isinstance(reference, Path) or len(path.parts) > 1 or path.suffix in _SUFFIXES
    shipped = shipped_configs()
    if not is_path and reference in shipped:
        return f"{reference}.yaml", (resources.files("msf_faiss_configs") / f"{reference}.yaml").read_text("utf-8")
    if not path.exists():
        close = [] if is_path else difflib.get_close_matches(str(reference), shipped, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"{reference}: no such config; {hint}give the path of a YAML file or a shipped name: {', '.join(shipped)}"
        )
    try:
        return str(reference), path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{reference}: not UTF-8 text (at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{reference}: cannot be read ({error.strerror}); give the path of a YAML file") from error


class _Draft:
    """Values on their way to a config, where each came from, and what is wrong so far."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.places: dict[Key, str] = {}  # "file:line" or "--set key=value"
        self.texts: dict[Key, str] = {}  # scalars as they were written
        self.problems: list[str] = []

    def read(self, text: str, name: str) -> None:
        """Take over a YAML document."""
        try:
            root = yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise UserError(f"{name}:{line}: not valid YAML: {error.problem}; check indentation and quotes") from error
        except yaml.YAMLError as error:
            raise UserError(f"{name}: not valid YAML: {str(error).splitlines()[0]}") from error
        self.places[()] = name
        if root is None or root.tag == _NULL:
            return
        if not isinstance(root, yaml.MappingNode):
            line = root.start_mark.line + 1
            raise UserError(f"{name}:{line}: must hold keys and values (key: value), found other text")
        self.values = self._value(root, (), file=name)

    def finish(self, overrides: Sequence[str]) -> Config:
        """Apply the overrides and validate everything."""
        for key, node, place in self._parse(overrides):
            self._set(key, node, place)
        config, errors = _validate(self.values)
        if errors and self._restore_texts(errors):
            config, errors = _validate(self.values)
        grouped: dict[Key, list[ErrorDetails]] = {}
        for error in errors:
            key = _key_of(error["loc"], self.values)
            grouped.setdefault((*key, "kind") if error["type"] == "union_tag_invalid" else key, []).append(error)
        for key, group in grouped.items():
            self._report(key, explain(key, group))
        if self.problems:
            count = "a problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
            raise UserError("\n  ".join([f"the config has {count}:", *self.problems]))
        assert config is not None, "without a problem there is a config"
        return config

    def _value(self, node: yaml.Node, key: Key, *, file: str = "", place: str = "", above: tuple[int, ...] = ()) -> Any:
        """A node as plain values. Notes where each key came from; reports keys that stand twice."""
        here = place or f"{file}:{node.start_mark.line + 1}"
        self.places.setdefault(key, here)
        if id(node) in above:
            self._report(key, "refers to itself; write the values out")
            return None
        above = (*above, id(node))
        if isinstance(node, yaml.ScalarNode):
            self.texts[key] = node.value
            return _scalar(node)
        if isinstance(node, yaml.SequenceNode):
            return [
                self._value(item, (*key, i), file=file, place=place, above=above) for i, item in enumerate(node.value)
            ]
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            at = place or f"{file}:{line}"
            if name_node.tag == _MERGE:
                bases = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for base in bases:
                    value = self._value(base, key, file=file, place=place, above=above)
                    merged = {**(value if isinstance(value, dict) else {}), **merged}
                continue
            name = str(name_node.value)
            if name in lines:
                first = "" if place else f" (first in line {lines[name]})"
                self.problems.append(f"{at}: {dotted((*key, name))}: stands twice{first}; keep one of them")
                continue
            lines[name] = line
            self.places[(*key, name)] = at
            values[name] = self._value(value_node, (*key, name), file=file, place=place, above=above)
        return {**merged, **values}

    def _parse(self, overrides: Sequence[str]) -> list[tuple[Key, yaml.Node | None, str]]:
        """Overrides as key, value and place, those of a `kind` first, so that the others find its section afresh."""
        parsed: list[tuple[Key, yaml.Node | None, str]] = []
        for text in overrides:
            name, equals, written = text.partition("=")
            key: Key = tuple(part.strip() for part in name.split("."))
            if not equals or not all(key):
                self.problems.append(f"--set {text}: must be KEY=VALUE, as in --set train.epochs=50")
                continue
            try:
                node = yaml.compose(written, Loader=_Loader)
            except yaml.YAMLError:  # a text that happens to look like broken YAML
                node = yaml.ScalarNode("tag:yaml.org,2002:str", written)
            self.texts[key] = written
            parsed.append((key, node, f"--set {text}"))
        return sorted(parsed, key=lambda entry: entry[0][-1] != "kind")

    def _set(self, key: Key, node: yaml.Node | None, place: str) -> None:
        inside = self.values
        for depth, part in enumerate(key[:-1], start=1):
            if inside.get(str(part)) is None:
                inside[str(part)] = {}
                self.places.setdefault(key[:depth], place)
            inside = inside[str(part)]
            if not isinstance(inside, dict):
                self.problems.append(f"{place}: {dotted(key[:depth])} holds a value; there are no keys below it")
                return
        for known in [known for known in self.places if known[: len(key)] == key]:
            del self.places[known]
        value = None if node is None else self._value(node, key, place=place)
        if key[-1] == "kind" and key[:-1] in _UNIONS and inside.get("kind", _UNIONS[key[:-1]].default) != value:
            for name in [name for name in inside if name not in _UNIONS[key[:-1]].common]:
                del inside[name]
            self.places[key[:-1]] = place
        inside[str(key[-1])] = value
        self.places[key] = place

    def _restore_texts(self, errors: Iterable[ErrorDetails]) -> bool:
        """Where text is due and a number or the like was read (`path: 2024`), put back what was written."""
        restored = False
        for error in errors:
            key = _key_of(error["loc"], self.values)
            if error["type"] in {"string_type", "path_type"} and key in self.texts:
                inside: Any = self.values
                for part in key[:-1]:
                    inside = inside[part]
                if inside[key[-1]] is not None:
                    inside[key[-1]] = self.texts[key]
                    restored = True
        return restored

    def _report(self, key: Key, text: str) -> None:
        place = next((self.places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in self.places), "config")
        if key not in self.texts:  # a rule of a section names its keys; the first that was written is the place to look
            named = [(*key, *name.split(".")) for name in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", text)]
            place = next((self.places[name] for name in named if name in self.places), place)
        self.problems.append(f"{place}: {dotted(key)}: {text}" if key else f"{place}: {text}")


class _Union:
    """A section whose `kind` decides its keys."""

    def __init__(self, models: Sequence[type[BaseModel]], default: str) -> None:
        self.default = default
        self.common = set.intersection(*(set(model.model_fields) for model in models))


def _unions(model: type[BaseModel], prefix: Key = ()) -> dict[Key, _Union]:
    """All sections of `model` with a kind, by key."""
    found = {}
    for name, field in model.model_fields.items():
        if field.discriminator is not None:
            members = field.annotation.__args__  # type: ignore[union-attr]
            found[(*prefix, name)] = _Union(members, field.default.kind)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _unions(field.annotation, (*prefix, name))
    return found


_UNIONS = _unions(Config)


def _validate(values: dict[str, Any]) -> tuple[Config | None, list[ErrorDetails]]:
    try:
        return Config.model_validate(_complete(values)), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def _complete(values: dict[str, Any], key: Key = ()) -> dict[str, Any]:
    """`values` without empty sections, and with the default `kind` where a section has none."""
    complete: dict[str, Any] = {} if key not in _UNIONS else {"kind": _UNIONS[key].default}
    for name, value in values.items():
        below = (*key, name)
        if isinstance(value, dict):
            complete[name] = _complete(value, below)
        elif isinstance(value, bool):  # pydantic takes true for the number 1, but this text only for a boolean
            complete[name] = str(value).lower()
        elif value is not None or not _is_section(below):
            complete[name] = value
    return complete


def _is_section(key: Key) -> bool:
    section: Any = Config()
    for part in key:
        section = getattr(section, str(part), None)
    return isinstance(section, BaseModel)


def _key_of(location: Key, values: Any) -> Key:
    """The key that a user wrote, from pydantic's, which also names the members of unions."""
    key: Key = ()
    for part in location:
        if isinstance(values, dict):
            if key in _UNIONS and part == values.get("kind", _UNIONS[key].default):
                continue  # the member of the union
            values = values.get(part)
        elif isinstance(values, list) and isinstance(part, int) and part < len(values):
            values = values[part]
        elif values is not None or isinstance(part, int):
            break  # the member of a union of plain types, or an entry that a list lacks
        key = (*key, part)
    return key


def dotted(key: Key) -> str:
    """A key as people write it: views.weak.crop_scale[0]."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


class _Loader(yaml.SafeLoader):
    """YAML without its traps: see the module's docstring."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own way)


class _Dumper(yaml.SafeDumper):
    """Blocks for sections, one line for lists."""


_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)$")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$|[-+]?\.(inf|nan)$")
_Loader.add_implicit_resolver(_NULL, re.compile(r"(~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver(_MERGE, re.compile(r"<<$"), ["<"])
_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))
# What this loader reads as a number or a word must be quoted where it is text.
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _scalar(node: yaml.ScalarNode) -> Any:
    """The value of a scalar; quoted, it is text."""
    text = str(node.value)
    if node.style is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.match(text):
        return int(text.replace("_", ""))
    if _FLOAT.match(text) and not re.match(r"[-+]?0[0-9]", text):
        return float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return text
