"""The keys of each section of a config, collected from the models in `schema`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from pydantic import BaseModel

from msf_faiss.config import Config

Key = tuple[str | int, ...]  # ("views", "weak", "crop_scale", 0)


@dataclass(frozen=True, slots=True)
class _SectionKinds:
    """The models of a section by kind; a section without a `kind` has one model, of kind ""."""

    models: dict[str, type[BaseModel]]
    default: str

    @property
    def is_union(self) -> bool:
        """Whether the key `kind` decides which other keys there are."""
        return "" not in self.models

    @property
    def shared(self) -> set[str]:
        """The keys that all kinds have."""
        return set.intersection(*(set(model.model_fields) for model in self.models.values()))

    def names(self, kind: str | None = None) -> list[str]:
        """The keys of one kind, or with None of any kind."""
        models = self.models.values() if kind is None else [self.models[kind]]
        return list(dict.fromkeys(name for model in models for name in model.model_fields))


def dotted(key: Key) -> str:
    """A key as users write it: views.weak.crop_scale[0]."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else ("." if text else "") + (part or "''")
    return text


def key_of(location: Sequence[str | int]) -> Key:
    """The key as the user wrote it, from pydantic's location, which also has the members of unions."""
    key: Key = ()
    parts = iter(location)
    for part in parts:
        if isinstance(part, str) and key not in SECTIONS:
            break  # one of several types that the value at `key` may have
        key = (*key, part)
        if key in SECTIONS and SECTIONS[key].is_union:
            next(parts, None)  # the kind
    return key


def _sections(model: type[BaseModel], key: Key = ()) -> dict[Key, _SectionKinds]:
    sections = {key: _SectionKinds({"": model}, "")}
    for name, field in model.model_fields.items():
        below = (*key, name)
        if field.discriminator is not None:
            members: tuple[type[BaseModel], ...] = get_args(field.annotation)
            kinds = {kind: each for each in members for kind in get_args(each.model_fields["kind"].annotation)}
            for member in members:
                sections |= _sections(member, below)
            sections[below] = _SectionKinds(kinds, field.default.kind)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections |= _sections(field.annotation, below)
    return sections


SECTIONS = _sections(Config)
