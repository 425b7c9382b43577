import json

from invoking import Cli


def test_the_schema_is_all_there_is_on_stdout(msf_faiss: Cli) -> None:
    done = msf_faiss("config-schema")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    schema = json.loads(done.stdout)
    assert {"data", "bank", "train"} <= set(schema["properties"])


def test_the_help_says_how_an_editor_finds_it(msf_faiss: Cli) -> None:
    assert "# yaml-language-server: $schema=schema.json" in " ".join(
        msf_faiss("config-schema", "--help").stdout.split()
    )
