import json

from invoking import Cli


def test_config_schema_prints_only_the_schema(msf_faiss: Cli) -> None:
    done = msf_faiss("config-schema")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    schema = json.loads(done.stdout)
    assert {"data", "bank", "train"} <= set(schema["properties"])


def test_help_says_how_editors_find_the_schema(msf_faiss: Cli) -> None:
    assert "# yaml-language-server: $schema=schema.json" in " ".join(
        msf_faiss("config-schema", "--help").stdout.split()
    )
