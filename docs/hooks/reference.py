"""Generate reference pages: commands from click, settings from the JSON Schema, Python from docstrings."""

from __future__ import annotations

import ast
import html
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from msf_faiss_cli.main import cli

from msf_faiss.config.load import config_schema, shipped_configs

ROOT = Path(__file__).parents[2]

Schema = dict[str, Any]


def on_config(config: MkDocsConfig) -> None:
    """Expand `FOLDER/*` in the navigation."""
    globs = {
        "decisions/*": sorted(f"decisions/{path.name}" for path in (ROOT / "docs" / "decisions").glob("*.md")),
        "reference/python/*": ["reference/python.md", *(f"reference/python/{name}.md" for name in packages())],
    }
    config.nav = _expand_globs(config.nav, globs)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the generated pages."""
    pages = {
        "reference/commands.md": commands(),
        "reference/configuration.md": configuration(),
        "reference/configs.md": configs(),
        **{f"reference/python/{name}.md": package(name) for name in packages()},
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))


def _expand_globs(nav: Any, globs: dict[str, list[str]]) -> Any:
    match nav:
        case list():
            return [_expand_globs(item, globs) for item in nav]
        case dict():
            return {title: _expand_globs(item, globs) for title, item in nav.items()}
        case _:
            return globs.get(nav, nav)


# Commands


def commands() -> str:
    """Return the page of commands, with one section per command: the output of `--help`."""
    context = click.Context(cli, info_name="msf-faiss")
    text = "# Commands\n\nThe output of `msf-faiss COMMAND --help`. See also [exit codes](../resuming.md#exit-codes).\n"
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        text += _command(command, click.Context(command, info_name=name, parent=context))
    return text


def _command(command: click.Command, context: click.Context) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    paragraphs = inspect.cleandoc(command.help or "").replace("\f", "").split("\n\n")
    text = f"\n## {context.info_name}\n\n```text\n{usage}\n```\n\n"
    text += "\n\n".join(map(_prose, paragraphs))
    options = [option for option in command.get_params(context) if isinstance(option, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context)) is not None]
    text += "\n\n| option | |\n|---|---|\n"
    return text + "".join(f"| <code>{_cell(names)}</code> | {_cell(meaning)} |\n" for names, meaning in records)


def _cell(text: str) -> str:
    return _prose(text).replace("|", "&#124;")


# Settings


def configuration() -> str:
    """Return the page of settings, with a heading per section and per key, so that links and search find each key."""
    schema = config_schema()
    text = (
        "# Configuration\n\nAll settings with their defaults. A YAML file contains only settings that differ from the "
        "defaults; `--set KEY=VALUE` overrides one. Unknown keys are errors. `msf-faiss config-schema` prints this "
        "page as a JSON Schema, with which editors complete and check configs.\n"
    )
    lone = {name: value for name, value in schema["properties"].items() if "description" in value}
    text += "".join(_key(name, value, level=2, anchor=name) for name, value in lone.items())
    for name, value in schema["properties"].items():
        if name not in lone:
            text += "".join(_section(name, value, schema["$defs"], level=2))
    return text


def _section(
    path: str, value: Schema, models: dict[str, Schema], *, level: int, anchor: str | None = None
) -> Iterator[str]:
    """Yield heading, description, keys and subsections of a section; for a choice of kinds, the keys of each kind."""
    anchor = anchor or path
    kinds = [models[kind["$ref"].rpartition("/")[2]] for kind in value.get("oneOf", [value])]
    shared = {
        name: key
        for name, key in kinds[0]["properties"].items()
        if name != "kind" and all(kind["properties"].get(name) == key for kind in kinds)
    }
    yield f"\n{'#' * level} {path} {{ #{anchor} }}\n"
    if len(kinds) == 1:
        yield f"\n{_prose(kinds[0].get('description', ''))}\n"
        yield from _keys(path, kinds[0]["properties"], models, level=level + 1, anchor=anchor)
        return
    names = ", ".join(f"`{name}`" for kind in kinds for name in _kinds(kind))
    yield f"\n`{path}.kind` is one of {names}; `{value['default']['kind']}` by default."
    yield f"{' Settings of every kind:' if shared else ''}\n"
    yield from _keys(path, shared, models, level=level + 1, anchor=anchor)
    for kind in kinds:
        own = {name: key for name, key in kind["properties"].items() if name != "kind" and name not in shared}
        of_kind = f"{anchor}.kind-{_kinds(kind)[0]}"
        yield f"\n{'#' * (level + 1)} {path}.kind: {' or '.join(_kinds(kind))} {{ #{of_kind} }}\n"
        yield f"\n{_prose(kind.get('description', ''))}\n"
        yield from _keys(path, own, models, level=level + 2, anchor=of_kind)


def _kinds(kind: Schema) -> list[str]:
    named = kind["properties"]["kind"]
    return named["enum"] if "enum" in named else [named["const"]]


def _keys(path: str, keys: Schema, models: dict[str, Schema], *, level: int, anchor: str) -> Iterator[str]:
    """Yield the keys, then the subsections."""
    sections = {name: key for name, key in keys.items() if "$ref" in key or "oneOf" in key}
    for name, key in keys.items():
        if name not in sections:
            yield _key(f"{path}.{name}", key, level=level, anchor=f"{anchor}.{name}")
    for name, key in sections.items():
        yield from _section(f"{path}.{name}", key, models, level=level, anchor=f"{anchor}.{name}")


def _key(path: str, key: Schema, *, level: int, anchor: str) -> str:
    default = "required" if "default" not in key else f"default `{_yaml(key['default'])}`"
    return (
        f"\n{'#' * level} `{path}` {{ #{anchor} }}\n\n{_prose(key.get('description', ''))}  \n"
        f"<small>{_type(key)} · {default}</small>\n"
    )


def _yaml(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _type(key: Schema) -> str:
    """Describe a type of the JSON Schema in words."""
    if "anyOf" in key:
        return " or ".join(_type(option) for option in key["anyOf"])
    if "enum" in key:
        return " or ".join(f"`{value}`" for value in key["enum"])
    if "const" in key:
        return f"`{key['const']}`"
    if key.get("type") == "array":
        items = key.get("prefixItems")
        return f"list of {len(items)} × {_type(items[0])}" if items else f"list of {_type(key['items'])}"
    if key.get("format") == "path":
        return "path"
    if "pattern" in key:
        return "amount of memory"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    text = words.get(key.get("type", ""), "`null`" if key.get("type") == "null" else "anything")
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return " ".join([text, *(f"{sign} {key[name]:,}," for name, sign in signs.items() if name in key)]).rstrip(",")


def _prose(text: str) -> str:
    """Escape a docstring as Markdown, except for `code`."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return escaped.replace("*", "\\*").replace("[", "\\[")


def configs() -> str:
    """Return the page of shipped configs, with the complete files."""
    text = (
        "# Shipped configs\n\nPass a name to `msf-faiss pretrain NAME`, or copy one of these to a file of your own.\n"
    )
    for name in shipped_configs():
        text += f"\n## {name}\n\n```yaml\n{(ROOT / 'configs' / f'{name}.yaml').read_text(encoding='utf-8')}```\n"
    return text


# Python


def packages() -> list[str]:
    """Return the dotted names of the library's packages."""
    return sorted(".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "msf_faiss").rglob("__init__.py"))


def package(name: str) -> str:
    """Return the page of a package: a table of its modules, and their public functions and classes."""
    folder = ROOT.joinpath(*name.split("."))
    modules = {
        f"{name}.{path.stem}": summary
        for path in sorted(folder.glob("*.py"))
        if path.stem != "__init__" and (summary := _summary(path)) is not None
    }
    text = f"# {name}\n\n{_prose(_summary(folder / '__init__.py') or '')}\n\n| module | |\n|---|---|\n"
    text += "".join(
        f"| [`{module.removeprefix(name + '.')}`][{module}] | {_cell(summary)} |\n"
        for module, summary in modules.items()
    )
    if own := _public(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))):
        text += f"\n::: {name}\n    options:\n      members: [{', '.join(own)}]\n"
    return text + "".join(f"\n::: {module}\n" for module in modules)


def _summary(path: Path) -> str | None:
    """Return the first line of a module's docstring, or None if the module has no public names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree)
    return doc.partition("\n\n")[0] if doc and (path.stem == "__init__" or _public(tree)) else None


def _public(tree: ast.Module) -> list[str]:
    """Return the public, documented functions and classes of a module."""
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_" and ast.get_docstring(node)
    ]
