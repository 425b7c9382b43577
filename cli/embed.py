"""`msf-faiss embed`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from .embed_options import check_images, open_images, options, progress, say

if TYPE_CHECKING:
    from msf_faiss.checkpoint.load import EncoderName
    from msf_faiss.embeddings.files import Dtype


@click.command
@options
@click.option(
    "--out",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A table (.parquet), or an array (.npy) with a table of its images (FILE.images.parquet).",
)
@click.option("--normalize/--no-normalize", default=False, show_default=True, help="Scale embeddings to unit norm.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Number format of the embeddings in the file.",
)
def command(
    run: Path,
    data: Path | None,
    split: Literal["train", "test"] | None,
    encoder: EncoderName,
    layer: str,
    overrides: tuple[str, ...],
    device: str,
    batch_size: int,
    force: bool,
    out: Path,
    normalize: bool,
    dtype: Dtype,
) -> None:
    """Write the embeddings of any images to a file.

    RUN is a run directory (its newest checkpoint) or a checkpoint directory. Each image is embedded from one centre
    crop, as in the evaluations. A row has the image's id, name, label and class (if there are classes) and embedding.
    The file is written atomically; its path is printed to stdout.
    """
    check_images(data, split)

    from msf_faiss.embeddings.embedder import output_files, write_embeddings
    from msf_faiss.embeddings.files import refuse_existing

    refuse_existing(output_files(out), force=force)  # before a large data set is opened
    embedder = open_images(run, data, split, encoder, layer, overrides, device)
    with progress(len(embedder.source)) as on_batch:
        rows = write_embeddings(
            embedder, out, normalize=normalize, dtype=dtype, batch_size=batch_size, force=force, on_batch=on_batch
        )
    skipped = len(embedder.source) - rows
    norm = "unit norm" if normalize else "not normalised"
    say(
        f"{rows:,} embeddings of {embedder.encoder.dim} dimensions ({dtype}, {norm}), {encoder} encoder, {layer}, step "
        f"{embedder.encoder.checkpoint.step:,}" + (f"; skipped {skipped:,} unreadable images" if skipped else "")
    )
    click.echo(os.fsencode(out))
