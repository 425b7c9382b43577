"""`msf-faiss embed`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from .embed_options import options, progress, say

if TYPE_CHECKING:
    from msf_faiss.checkpoint.load import EncoderName
    from msf_faiss.embeddings.embedder import Number, Part


@click.command(short_help="Write the embeddings of any images to a file.")
@options
@click.option(
    "--out",
    required=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A table (.parquet), or an array (.npy) with a table of its images beside it (FILE.images.parquet).",
)
@click.option(
    "--normalize/--no-normalize", default=False, show_default=True, help="To unit norm, or as the encoder gives them."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of the numbers in the file.",
)
def command(
    run: Path,
    data: Path | None,
    split: Literal["train", "test"] | None,
    encoder: EncoderName,
    part: Part,
    overrides: tuple[str, ...],
    device: str,
    batch_size: int,
    force: bool,
    out: Path,
    normalize: bool,
    dtype: Number,
) -> None:
    """Write the embeddings of any images to a file.

    RUN is a run directory (its newest checkpoint) or a checkpoint directory. Images are seen as the evaluations see
    them, one centre crop each. A row has the image's number, its name, its label and class where there are classes, and
    its embedding. The file appears when it is complete; its path goes to stdout.
    """
    if data is not None and split is not None:
        raise click.UsageError("--data names the images; --split chooses among those of the run: give one of them")

    from msf_faiss.device import select_device
    from msf_faiss.embeddings.embedder import embed, files_of, open_embedder, refuse_existing

    refuse_existing(files_of(out), force=force)  # before a large data set is opened
    embedder = open_embedder(
        run,
        data=data,
        overrides=overrides,
        split=split or "train",
        encoder=encoder,
        part=part,
        device=select_device(device),
    )
    say(f"embedding {len(embedder.source):,} images ({embedder.config.data.kind})")
    with progress(len(embedder.source)) as on_batch:
        done = embed(
            embedder, out, normalize=normalize, dtype=dtype, batch_size=batch_size, force=force, on_batch=on_batch
        )
    skipped = len(embedder.source) - done
    say(
        f"{done:,} embeddings of {embedder.dim} numbers ({dtype}, {'unit norm' if normalize else 'not normalised'}), "
        f"{encoder} encoder, {part}, step {embedder.checkpoint.step:,}"
        + (f"; left out: {skipped:,} unreadable images" if skipped else "")
    )
    click.echo(os.fsencode(out))
