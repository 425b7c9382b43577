"""`msf-faiss export`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from msf_faiss.checkpoint.load import EncoderName
    from msf_faiss.export.formats import Format


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--format",
    type=click.Choice(["torchvision", "timm", "safetensors", "onnx"]),
    required=True,
    help="torchvision: a state_dict (.pth); timm: a folder for timm.create_model; safetensors: weights of any network; "
    "onnx: a graph for onnxruntime and others.",
)
@click.option(
    "--encoder",
    type=click.Choice(["online", "target"]),
    default="online",
    show_default=True,
    help="online: the trained encoder; target: its moving average.",
)
@click.option("--projector", is_flag=True, help="Include the projector (safetensors and onnx only).")
@click.option(
    "--out",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Folder to write.  [default: RUN/exports/FORMAT-ENCODER-step-N; required for a checkpoint outside a run]",
)
@click.option("--force", is_flag=True, help="Replace an export of other weights, or one whose files were edited.")
def command(run: Path, format: Format, encoder: EncoderName, projector: bool, out: Path | None, force: bool) -> None:
    """Export an encoder for other libraries, with a model card.

    RUN is a run directory (its newest checkpoint) or a checkpoint directory. The folder contains the weights; a model
    card (README.md) with usage, preprocessing, training and the results of RUN's evaluations; and the same facts as
    JSON (msf-faiss.json). Its path is printed to stdout. Export again to update the results in the card.
    """
    from msf_faiss.embeddings.encoder import load_encoder
    from msf_faiss.export import export_encoder

    folder = export_encoder(load_encoder(run, encoder, projector=projector), format, out, force=force)
    click.echo(os.fsencode(folder))
