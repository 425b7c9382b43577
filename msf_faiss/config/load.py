"""Configs as YAML files and `--set` overrides: read with every problem reported at once, written to be read again.

A key may stand only once, and a section that is left empty has its defaults. Paths are relative to the working
directory, wherever the file lies; `~` is the home folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from msf_faiss.config import Config
from msf_faiss.config.draft import Draft
from msf_faiss.config.yaml_subset import dump
from msf_faiss.errors import UserError

_SUFFIXES = (".yaml", ".yml")


def load_config(reference: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """The config in a YAML file, or of a shipped name, with overrides.

    Args:
        reference: a path, or the name of a shipped config; None: "demo". Text with a separator or an ending is a path.
        overrides: "dotted.key=value", later ones win; the value is read as in YAML. Setting `data.kind` or
            `model.backbone.kind` to another kind starts that section afresh, but for what all kinds share
            (`workers`, `cache`, `unreadable`, `unreadable_limit`) and for what other overrides set, whatever their
            order. A mapping, as in views={size: 64}, replaces a whole section.

    Raises:
        UserError: with a line for every problem, `place: key: what is wrong; what instead`; the place is `file:line`,
            or the override.
    """
    name, text = _find("demo" if reference is None else reference)
    draft = Draft()
    draft.read(text, name)
    draft.override(overrides)
    return draft.finish()


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with overrides, as `load_config` applies them to a file.

    Raises:
        UserError: with a line for every problem.
    """
    draft = Draft(config.model_dump(mode="json"))
    draft.override(overrides)
    return draft.finish()


def dump_config(config: Config) -> str:
    """The complete config as YAML; loading it gives an equal config."""
    return dump(_kind_first(config.model_dump(mode="json")))


def _kind_first(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _kind_first(values[name]) if isinstance(values[name], dict) else values[name]
        for name in sorted(values, key=lambda name: name != "kind")
    }


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
    try:
        return str(reference), path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        close = difflib.get_close_matches(path.stem, shipped, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise UserError(
            f"{reference}: no such config; {hint}give the path of a YAML file or a shipped name: {', '.join(shipped)}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{reference}: not UTF-8 text (at byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{reference}: cannot be read ({error.strerror}); give the path of a YAML file") from error
