"""A config while it is read from YAML and overrides, with the place of each value; reports all problems at once."""

from __future__ import annotations

import copy
import json
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


class _Place(NamedTuple):
    """Where a value was written. Places sort by the lines of the file, then by the overrides."""

    override: int  # 0: in the file; else number of the override, from 1
    line: int  # from 1; 0: not a single line
    name: str  # of the file, or the override itself

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name

    def at(self, node: yaml.Node) -> _Place:
        """The place of a node of the same text."""
        return self if self.override else self._replace(line=node.start_mark.line + 1)


class Draft:
    """The values so far, the place of each, and the problems found so far."""

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        self._values: dict[str, Any] = {} if values is None else values
        self._places: dict[Key, _Place] = {(): _Place(0, 0, "config")}
        self._texts: dict[Key, str] = {}  # scalars as they were written
        self._invalid: set[Key] = set()  # keys whose problem has been reported
        self._problems: list[tuple[_Place, str]] = []

    def read(self, text: str, name: str) -> None:
        """Read a YAML document; `name` is that of the file in messages.

        Raises:
            UserError: if it is not YAML or not a mapping. All other problems are collected.
        """
        place = self._places[()] = _Place(0, 0, name)
        try:
            root = compose(text)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{name}:{mark.line + 1}" if mark else name
            problem = error.problem or error.context
            raise UserError(f"{where}: not valid YAML: {problem}; check indentation, quotes and colons") from error
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise UserError(f"{name}:{line}: not valid YAML: contains a control character; remove it") from error
        if root is None or root.tag == NULL:
            return
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{place.at(root)}: must consist of keys and values, such as `seed: 1`")
        self._values = self._read_mapping(root, (), place, ())

    def override(self, overrides: Sequence[str]) -> None:
        """Apply overrides "dotted.key=value" in order."""
        for number, text in enumerate(overrides, start=1):
            place = _Place(number, 0, f"--set {text}")
            name, equals, written = text.partition("=")
            key: Key = tuple(part.strip() for part in name.split("."))
            if not equals or not all(key):
                self._problems.append((place, "must be KEY=VALUE, such as --set train.epochs=50"))
                continue
            try:
                node = compose(written)
            except yaml.YAMLError:  # text that happens to look like broken YAML
                node = yaml.ScalarNode("tag:yaml.org,2002:str", written)
            self._set(key, node, place)

    def finish(self) -> Config:
        """The validated config.

        Raises:
            UserError: with one line per problem, in the order of their places.
        """
        config = self._validate()
        if self._problems:
            lines = [f"{place}: {text}" for place, text in sorted(self._problems, key=lambda problem: problem[0][:2])]
            heading = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
            raise UserError("\n  ".join([f"the config has {heading}:", *lines]))
        assert config is not None, "a config without problems is valid"
        return config

    # Reading nodes. `above`: the nodes that contain a node; an alias may refer to one of them.

    def _read(self, node: yaml.Node, key: Key, place: _Place, above: tuple[yaml.Node, ...]) -> Any:
        self._places[key] = place
        self._texts.pop(key, None)
        if node in above:
            return self._reject(key, "refers to itself; write the values out")
        if isinstance(node, yaml.ScalarNode):
            self._texts[key] = node.value
            try:
                return scalar(node)
            except ValueError as error:
                return self._reject(key, str(error))
        if isinstance(node, yaml.SequenceNode):
            return [self._read(item, (*key, i), place.at(item), (*above, node)) for i, item in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        return self._read_mapping(node, key, place, (*above, node))

    def _read_mapping(
        self, node: yaml.MappingNode, key: Key, place: _Place, above: tuple[yaml.Node, ...]
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
                self._problems.append((here, f"{dotted((*key, '?'))}: a key must be a word, not a list or a section"))
                continue
            name = str(name_node.value)
            if name in lines:
                first = f" (first in line {lines[name]})" if here.line else ""
                self._problems.append((here, f"{dotted((*key, name))}: duplicate key{first}; keep one of them"))
                continue
            lines[name] = here.line
            values[name] = self._read(value_node, (*key, name), here, above)
        return values

    def _set(self, key: Key, node: yaml.Node | None, place: _Place) -> None:
        section, name = key[:-1], str(key[-1])
        inside = self._values
        for depth, part in enumerate(section, start=1):
            if inside.get(str(part)) is None:
                inside[str(part)] = {}
                self._places[key[:depth]] = place
            inside = inside[str(part)]
            if not isinstance(inside, dict):
                self._problems.append((place, f"{dotted(key[:depth])}: is a value, not a section; it has no keys"))
                return
        for known in [known for known in self._places if known[: len(key)] == key]:
            del self._places[known]
        value = None if node is None else self._read(node, key, place, ())
        self._places[key], self._texts[key] = place, place.name.partition("=")[2]
        kinds = SECTIONS.get(section)
        if kinds is not None and kinds.is_union and name == "kind" and value != inside.get("kind", kinds.default):
            for other in set(inside) - kinds.shared:  # belongs to the old kind, unless it comes from an override too
                if not self._place((*section, other)).override:
                    del inside[other]
                    self._places.pop((*section, other), None)
            self._places[section] = place
        inside[name] = value

    # Validating.

    def _validate(self) -> Config | None:
        """The config; or None, after reporting every problem.

        Pydantic checks a rule between keys only once each key is valid. So invalid keys are removed and the rest is
        validated again, until nothing is invalid. Rules that involve a removed key are not reported.
        """
        values, removed = copy.deepcopy(self._values), self._invalid
        for key in removed:
            _remove(values, key)
        config, errors = _try(values)
        if self._restore_texts(values, errors):
            config, errors = _try(values)
        while errors:
            grouped: dict[Key, list[ErrorDetails]] = {}
            for error in errors:
                grouped.setdefault(key_of(error["loc"]), []).append(error)
            for key, group in grouped.items():
                if not any(one[: len(other)] == other for one in _involved(key, group) for other in removed):
                    self._report_group(key, group)
            gone = {_present(values, one) for key, group in grouped.items() for one in _to_remove(key, group)}
            if () in gone:
                return None
            for key in gone:
                _remove(values, key)
            removed |= gone
            config, errors = _try(values)
        return config

    def _restore_texts(self, values: dict[str, Any], errors: Sequence[ErrorDetails]) -> bool:
        """Where text is expected and YAML read something else (`path: 2024`), put back what was written."""
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

    def _reject(self, key: Key, text: str) -> None:
        self._invalid.add(key)
        self._report(key, text)

    def _report_group(self, key: Key, errors: Sequence[ErrorDetails]) -> None:
        text = explain(key, errors)
        if errors[0]["type"] == "rule":
            # Reported where one of the keys was written: at an override if there is one.
            keys = _involved(key, errors)
            written = [self._places[one] for one in keys if one in self._places]
            place = max(written, key=lambda place: place.override > 0, default=self._place(key))
            return self._problems.append((place, f"{dotted(keys[0])}: {text}"))
        if errors[0]["type"].startswith("union_tag"):
            for name in errors[0]["input"]:
                if not _exists((*key, name)):
                    self._report((*key, name), unknown_key((*key, name)))
            key = (*key, "kind")
        return self._report(key, text)

    def _report(self, key: Key, text: str) -> None:
        self._problems.append((self._place(key), f"{dotted(key)}: {text}"))

    def _place(self, key: Key) -> _Place:
        return next(self._places[key[:n]] for n in range(len(key), -1, -1) if key[:n] in self._places)


def _involved(key: Key, errors: Sequence[ErrorDetails]) -> list[Key]:
    """The keys that a problem is about: `key`, or those of a rule of the section `key`."""
    if errors[0]["type"] != "rule":
        return [key]
    return [(*key, *name.split(".")) for name in errors[0]["ctx"]["keys"]]


def _to_remove(key: Key, errors: Sequence[ErrorDetails]) -> list[Key]:
    """The keys that are invalid: `key`, or in a section of unknown kind those that not every kind has."""
    if not errors[0]["type"].startswith("union_tag"):
        return [key]
    return [(*key, name) for name in errors[0]["input"] if name == "kind" or name not in SECTIONS[key].shared]


def _exists(key: Key) -> bool:
    section = SECTIONS.get(key[:-1])
    return section is not None and key[-1] in section.names()


def _present(values: Any, key: Key) -> Key:
    """`key`, or the innermost key around it that is in `values`. A list counts as a single value."""
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


def _try(values: dict[str, Any]) -> tuple[Config | None, list[ErrorDetails]]:
    # Strict mode: `true` is not a number, "5" not an integer. From JSON, where strict mode accepts lists as tuples.
    try:
        return Config.model_validate_json(json.dumps(_complete(values)), strict=True), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def _complete(values: dict[str, Any], key: Key = ()) -> dict[str, Any]:
    """`values` without empty sections, and with the default `kind` where a section has none."""
    kinds = SECTIONS.get(key)
    complete: dict[str, Any] = {"kind": kinds.default} if kinds is not None and kinds.is_union else {}
    for name, value in values.items():
        below = (*key, name)
        if isinstance(value, dict):
            complete[name] = _complete(value, below)
        elif value is not None or below not in SECTIONS:
            complete[name] = value
    return complete
