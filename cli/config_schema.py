"""`msf-faiss config-schema`."""

import click


@click.command()
def command() -> None:
    """Print the JSON Schema of the config, for editors.

    \b
    Save it and begin a config with a line that names it:
      msf-faiss config-schema > schema.json
      # yaml-language-server: $schema=schema.json
    The editor then completes keys, explains them and marks mistakes.
    """
    import json

    from msf_faiss.config.load import config_schema

    click.echo(json.dumps(config_schema(), indent=2))
