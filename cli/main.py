"""The entry point: finds the command, and turns errors into exit codes.

0 success · 1 bug, with a traceback · 2 error that the user can correct, with a message · 3 `status`: the run is not
training · 75 ended early, run the same command again · 130 interrupted by Ctrl-C · 128 + n ended at once by a second
signal, number n
"""

import importlib
import os
import sys

import click

# Commands are imported when they run, so that `--help` does not wait for torch.
_COMMANDS = {
    "pretrain": "Pretrain an encoder on images without labels.",
    "status": "Show the status of a run from another terminal.",
    "eval-all": "Run every evaluation that the data allow, and summarise them on one page.",
    "eval-knn": "Score frozen features by their nearest neighbours.",
    "eval-linear": "Score frozen features by a linear probe, the paper's protocol.",
    "eval-semi": "Score an encoder with 1 % and 10 % of the labels, frozen and fine-tuned.",
    "eval-transfer": "Score frozen features by logistic regression, on any labelled data.",
    "inspect-neighbors": "See the neighbours that a checkpoint's bank retrieves.",
    "results": "Show all evaluation results of a run.",
    "report": "Write a report of one or several runs as a self-contained HTML page.",
    "export": "Export an encoder for other libraries, with a model card.",
    "embed": "Write the embeddings of any images to a file.",
    "index": "Write a FAISS index over the embeddings of any images, or over the bank.",
    "doctor": "Diagnose this machine: versions, GPUs, search speed, and problems with their remedies.",
    "config-schema": "Print the JSON Schema of configs, for editors.",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module = importlib.import_module(f".{cmd_name.replace('-', '_')}", __package__)
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="To start, without any download:  msf-faiss pretrain demo --out runs/first",
)
@click.version_option(package_name="msf-faiss", message="msf-faiss %(version)s")
def cli() -> None:
    """Pretrain image encoders without labels by Mean Shift with a FAISS memory bank, and inspect what they learn."""


def main() -> None:
    """Run the command line and exit."""
    from msf_faiss.errors import EXIT_RESTART, PeerError, RestartError, UserError
    from msf_faiss.threads import set_waiting

    set_waiting()
    try:
        code = cli.main(prog_name="msf-faiss", standalone_mode=False)
    except PeerError:
        code = 2
    except RestartError as error:
        click.echo(f"error: {error}", err=True)
        code = EXIT_RESTART
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        code = 2
    except click.ClickException as error:
        error.show()
        code = 2
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        code = 130
    except BrokenPipeError:  # stdout was closed, by `head` for example
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code if isinstance(code, int) else 0)
