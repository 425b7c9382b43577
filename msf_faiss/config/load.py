"""Load configs from YAML files, shipped names and `--set` overrides, and dump them.

Duplicate keys are errors; an empty section has its defaults. Paths are relative to the working directory, not to the
file; `~` is the home folder.
"""

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
    """Load a YAML file or a shipped config, and apply overrides.

    Args:
        reference: path of a file, or name of a shipped config; None: "demo". A string with a path separator or the
            extension .yaml or .yml is a path.
        overrides: "dotted.key=value" with the value in YAML; later ones win. Changing the `kind` of a section resets
            the section, except for keys that all kinds share (such as `data.workers`) and keys that other overrides
            set. A mapping, such as views={size: 64}, replaces the whole section.

    Raises:
        UserError: with one line per problem, `place: key: what is wrong; what to do`; the place is `file:line` or the
            override.
    """
    name, text = _find("demo" if reference is None else reference)
    draft = Draft()
    draft.read(text, name)
    draft.override(overrides)
    return draft.finish()


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """Apply overrides to `config` as `load_config` does.

    Raises:
        UserError: with one line per problem.
    """
    draft = Draft(config.model_dump(mode="json"))
    draft.override(overrides)
    return draft.finish()


def dump_config(config: Config) -> str:
    """The complete config as YAML, from which `load_config` loads an equal one."""
    return dump(_kind_first(config.model_dump(mode="json")))


def _kind_first(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _kind_first(values[name]) if isinstance(values[name], dict) else values[name]
        for name in sorted(values, key=lambda name: name != "kind")
    }


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a config file, for editors."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "msf-faiss config"}


def shipped_configs() -> dict[str, str]:
    """The purpose of each shipped config (the first line of its file), by name."""
    folder = resources.files("msf_faiss_configs")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(_SUFFIXES))
    headers = {name: (folder / name).read_text(encoding="utf-8").partition("\n")[0] for name in names}
    return {name.rpartition(".")[0]: header.removeprefix("# ") for name, header in headers.items()}


def _find(reference: str | Path) -> tuple[str, str]:
    """The file's name for messages, and its text."""
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
