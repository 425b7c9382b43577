"""`msf-faiss export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from msf_faiss.checkpoint.load import EncoderName
    from msf_faiss.export.encoder import Format


@click.command(short_help="Write an encoder in another library's format, with a model card.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    type=click.Choice(["torchvision", "timm", "safetensors", "onnx"]),
    required=True,
    help="torchvision: a state dict (.pth); timm: a folder for timm.create_model; safetensors: any of our networks; "
    "onnx: a graph, for onnxruntime and others.",
)
@click.option(
    "--encoder",
    type=click.Choice(["online", "target"]),
    default="online",
    show_default=True,
    help="online: the one that is trained and that evaluations score; target: its moving average.",
)
@click.option("--projector", is_flag=True, help="With the projector behind the backbone (safetensors, onnx).")
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="A folder for the export.  [default: RUN/exports/FORMAT-ENCODER-step-N; none for a checkpoint outside a run]",
)
@click.option("--force", is_flag=True, help="Replace an export of other weights, or one that was changed since.")
def command(run: Path, format: Format, encoder: EncoderName, projector: bool, out: Path | None, force: bool) -> None:
    """Write an encoder in another library's format, with a model card.

    RUN is a run directory (its newest checkpoint) or a checkpoint directory. The folder, whose path goes to stdout,
    holds the weights, a model card (README.md) with the results of RUN's evaluations, training, input and code that
    loads it, and the same facts for programs (msf-faiss.json). Exporting again brings new results into the card.
    """
    from msf_faiss.checkpoint.format import find_checkpoint
    from msf_faiss.export import export_encoder, exported_encoder

    folder = export_encoder(
        exported_encoder(find_checkpoint(run), encoder, projector=projector), format, out, force=force
    )
    click.echo(os.fsencode(folder))
