"""`msf-faiss config-schema`."""

from __future__ import annotations

import click


@click.command()
def command() -> None:
    """Print the JSON Schema of the config, for editors.

    Save it (msf-faiss config-schema > schema.json) and begin a config with the line
    "# yaml-language-server: $schema=schema.json": the editor then completes keys, explains them and marks mistakes.
    """
    import json

    from msf_faiss.config_file import config_schema

    click.echo(json.dumps(config_schema(), indent=2))
