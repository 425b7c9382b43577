"""A config on its way from YAML and overrides to a validated `Config`, collecting every problem with its place."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from msf_faiss.config import Config
from msf_faiss.config.messages import explain, unknown_key
from msf_faiss.config.sections import SECTIONS, Key, dotted, key_of
from msf_faiss.config.yaml_subset import MERGE, NULL, compose, scalar
from msf_faiss.errors import UserError


class Place(NamedTuple):
    """Where something was written. Places sort as a reader meets them: the file's lines, then the overrides."""

    override: int  # 0: in the file; else which override, from 1
    line: int  # from 1; 0: the whole
    name: str  # the file, or the override

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name

    def at(self, node: yaml.Node) -> Place:
        """The place of a node in the same text."""
        return self if self.override else self._replace(line=node.start_mark.line + 1)


class Draft:
    """Values, where each came from, and what is wrong so far."""

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        self._values: dict[str, Any] = {} if values is None else values
        self._places: dict[Key, Place] = {(): Place(0, 0, "config")}
        self._texts: dict[Key, str] = {}  # scalars as they were written
        self._unread: set[Key] = set()
        self._problems: list[tuple[Place, str]] = []

    def read(self, text: str, name: str) -> None:
        """Take the values of a YAML document; `name` is what its problems are reported under.

        Raises:
            UserError: it is not a YAML mapping, so that nothing in it can be judged.
        """
        place = self._places[()] = Place(0, 0, name)
        try:
            root = compose(text)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{name}:{mark.line + 1}" if mark else name
            what = error.problem or error.context
            raise UserError(f"{where}: not valid YAML: {what}; check indentation, quotes and colons") from error
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise UserError(f"{name}:{line}: not valid YAML: a control character; remove it") from error
        if root is None or root.tag == NULL:
            return
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{place.at(root)}: must hold sections and keys, as in `seed: 1`, found something else")
        self._values = self._read_mapping(root, (), place, ())

    def override(self, overrides: Sequence[str]) -> None:
        """Apply "dotted.key=value" in order."""
        for number, text in enumerate(overrides, start=1):
            place = Place(number, 0, f"--set {text}")
            name, equals, written = text.partition("=")
            key: Key = tuple(part.strip() for part in name.split("."))
            if not equals or not all(key):
                self._problems.append((place, "must be KEY=VALUE, as in --set train.epochs=50"))
                continue
            try:
                node = compose(written)
            except yaml.YAMLError:  # text that happens to look like broken YAML
                node = yaml.ScalarNode("tag:yaml.org,2002:str", written)
            self._set(key, node, place)

    def finish(self) -> Config:
        """The config.

        Raises:
            UserError: with a line for every problem, in the order of the places.
        """
        config = self._validate()
        if self._problems:
            lines = [f"{place}: {text}" for place, text in sorted(self._problems, key=lambda problem: problem[0][:2])]
            heading = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
            raise UserError("\n  ".join([f"the config has {heading}:", *lines]))
        assert config is not None, "without a problem there is a config"
        return config

    # Reading nodes. `above` holds the nodes around one, since an alias may name one of them.

    def _read(self, node: yaml.Node, key: Key, place: Place, above: tuple[yaml.Node, ...]) -> Any:
        self._places[key] = place
        self._texts.pop(key, None)
        if node in above:
            return self._refuse(key, "refers to itself; write the values out")
        if isinstance(node, yaml.ScalarNode):
            self._texts[key] = node.value
            try:
                return scalar(node)
            except ValueError as error:
                return self._refuse(key, str(error))
        if isinstance(node, yaml.SequenceNode):
            return [self._read(item, (*key, i), place.at(item), (*above, node)) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        return self._read_mapping(node, key, place, (*above, node))

    def _read_mapping(
        self, node: yaml.MappingNode, key: Key, place: Place, above: tuple[yaml.Node, ...]
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, merged in node.value:
            if name_node.tag != MERGE:
                continue
            bases = merged.value if isinstance(merged, yaml.SequenceNode) else [merged]
            for base in reversed(bases):  # the first of several wins
                if isinstance(base, yaml.MappingNode) and base not in above:
                    values |= self._read_mapping(base, key, place.at(base), (*above, base))
                else:
                    self._problems.append((place.at(name_node), f"{dotted((*key, '<<'))}: must name another section"))
        lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            here = place.at(name_node)
            if name_node.tag == MERGE:
                continue
            if not isinstance(name_node, yaml.ScalarNode):
                self._problems.append((here, f"{dotted((*key, '?'))}: a key must be a word, found a list or a section"))
                continue
            name = str(name_node.value)
            if name in lines:
                first = f" (first in line {lines[name]})" if here.line else ""
                self._problems.append((here, f"{dotted((*key, name))}: stands twice{first}; keep one of them"))
                continue
            lines[name] = here.line
            values[name] = self._read(value_node, (*key, name), here, above)
        return values

    def _set(self, key: Key, node: yaml.Node | None, place: Place) -> None:
        section, name = key[:-1], str(key[-1])
        inside = self._values
        for depth, part in enumerate(section, start=1):
            if inside.get(str(part)) is None:
                inside[str(part)] = {}
                self._places[key[:depth]] = place
            inside = inside[str(part)]
            if not isinstance(inside, dict):
                self._problems.append((place, f"{dotted(key[:depth])}: holds a value; there are no keys below it"))
                return
        for known in [known for known in self._places if known[: len(key)] == key]:
            del self._places[known]
        value = None if node is None else self._read(node, key, place, ())
        self._places[key], self._texts[key] = place, place.name.partition("=")[2]
        kinds = SECTIONS.get(section)
        if kinds is not None and kinds.is_union and name == "kind" and value != inside.get("kind", kinds.default):
            for other in set(inside) - kinds.shared:  # they made sense for the old kind, unless overrides set them too
                if not self._place((*section, other)).override:
                    del inside[other]
                    self._places.pop((*section, other), None)
            self._places[section] = place
        inside[name] = value

    # Validating.

    def _validate(self) -> Config | None:
        """The config, or with every problem noted whatever is left of it.

        Pydantic judges what spans several keys only once each of them is right. So what is wrong is taken out and the
        rest judged again, until nothing is wrong; then rules that a removed key would have a part in are left alone.
        """
        values, removed = copy.deepcopy(self._values), self._unread
        for key in removed:
            _remove(values, key)
        config, errors = _judge(values)
        if self._restore_texts(values, errors):
            config, errors = _judge(values)
        while errors:
            grouped: dict[Key, list[ErrorDetails]] = {}
            for error in errors:
                grouped.setdefault(key_of(error["loc"]), []).append(error)
            for key, group in grouped.items():
                if not any(one[: len(other)] == other for one in _concerned(key, group) for other in removed):
                    self._report_group(key, group)
            gone = {_present(values, one) for key, group in grouped.items() for one in _spoiled(values, key, group)}
            if () in gone:
                return None
            for key in gone:
                _remove(values, key)
            removed |= gone
            config, errors = _judge(values)
        return config

    def _restore_texts(self, values: dict[str, Any], errors: Sequence[ErrorDetails]) -> bool:
        """Where text is due and a number or the like was read (`path: 2024`), put back what was written."""
        keys = {key_of(error["loc"]) for error in errors if error["type"] in {"string_type", "path_type"}}
        restored = False
        for key in keys & set(self._texts):
            inside: Any = values
            for part in key[:-1]:
                inside = inside[part]
            if inside[key[-1]] is not None:
                inside[key[-1]] = self._texts[key]
                restored = True
        return restored

    def _refuse(self, key: Key, text: str) -> None:
        self._unread.add(key)
        self._report(key, text)

    def _report_group(self, key: Key, errors: Sequence[ErrorDetails]) -> None:
        text = explain(key, errors)
        if errors[0]["type"].startswith("union_tag"):
            for name in errors[0]["input"]:
                if not _exists((*key, name)):
                    self._report((*key, name), unknown_key((*key, name)))
            return self._report((*key, "kind"), text)
        if key not in SECTIONS or errors[0]["type"] != "value_error":
            return self._report(key, text)
        # A rule of a section: the text starts with the key at fault, and names the others that have a part in it.
        written = [self._places[one] for one in _concerned(key, errors) if one in self._places]
        place = max(written, key=lambda place: place.override > 0, default=self._place(key))
        self._problems.append((place, f"{dotted(key)}.{text}" if key else text))
        return None

    def _report(self, key: Key, text: str) -> None:
        self._problems.append((self._place(key), f"{dotted(key)}: {text}"))

    def _place(self, key: Key) -> Place:
        return next(self._places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in self._places)


def _concerned(key: Key, errors: Sequence[ErrorDetails]) -> list[Key]:
    """The keys that have a part in a problem: `key`, or those that a rule of the section `key` names."""
    if key not in SECTIONS or errors[0]["type"] != "value_error":
        return [key]
    words = re.findall(r"[a-z_]+(?:\.[a-z_]+)*", explain(key, errors))
    return [one for word in words if _exists(one := (*key, *word.split(".")))]


def _spoiled(values: Any, key: Key, errors: Sequence[ErrorDetails]) -> list[Key]:
    """The keys that cannot be judged: `key`, or of a section of unknown kind those that only some kinds have."""
    if not errors[0]["type"].startswith("union_tag"):
        return [key]
    return [(*key, name) for name in errors[0]["input"] if name == "kind" or name not in SECTIONS[key].shared]


def _exists(key: Key) -> bool:
    section = SECTIONS.get(key[:-1])
    return section is not None and key[-1] in section.names()


def _present(values: Any, key: Key) -> Key:
    """`key`, or the innermost key around it that holds something in `values`. Lists count as one thing."""
    for depth, part in enumerate(key):
        if not isinstance(values, dict) or part not in values:
            return key[:depth]
        values = values[part]
    return key


def _remove(values: Any, key: Key) -> None:
    key = _present(values, key)
    for part in key[:-1]:
        values = values[part]
    if key:
        del values[key[-1]]


def _judge(values: dict[str, Any]) -> tuple[Config | None, list[ErrorDetails]]:
    # Strict, so that `true` is no number and "5" no count; as JSON, where strictness still lets a list be a tuple.
    try:
        return Config.model_validate_json(json.dumps(_complete(values)), strict=True), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def _complete(values: dict[str, Any], key: Key = ()) -> dict[str, Any]:
    """`values` without empty sections, and with the default `kind` where a section names none."""
    kinds = SECTIONS.get(key)
    complete: dict[str, Any] = {"kind": kinds.default} if kinds is not None and kinds.is_union else {}
    for name, value in values.items():
        below = (*key, name)
        if isinstance(value, dict):
            complete[name] = _complete(value, below)
        elif value is not None or below not in SECTIONS:
            complete[name] = value
    return complete
