"""`msf-faiss config-schema`."""

import click


@click.command()
def command() -> None:
    """Print the JSON Schema of configs, for editors.

    \b
    Save the schema, and name it in the first line of a config:
      msf-faiss config-schema > schema.json
      # yaml-language-server: $schema=schema.json
    The editor then completes keys, shows their descriptions and marks errors.
    """
    import json

    from msf_faiss.config.load import config_schema

    click.echo(json.dumps(config_schema(), indent=2))
