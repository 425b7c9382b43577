"""`msf-faiss index`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from .embed_options import check_images, open_images, options, progress, say

if TYPE_CHECKING:
    from msf_faiss.checkpoint.load import EncoderName
    from msf_faiss.search.index_file import IndexKind

_FOR_IMAGES = ("data", "split", "encoder", "layer", "device", "batch_size")


@click.command
@options
@click.option("--from-bank", is_flag=True, help="Index the entries of the checkpoint's bank instead of images.")
@click.option(
    "--kind",
    type=click.Choice(["flat", "ivf", "ivf-sq8"]),
    default="flat",
    show_default=True,
    help="flat: exact; ivf: inverted lists, approximate and faster; ivf-sq8: ivf with 8-bit vectors.",
)
@click.option("--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The index file.")
@click.pass_context
def command(
    context: click.Context,
    run: Path,
    data: Path | None,
    split: Literal["train", "test"] | None,
    encoder: EncoderName,
    layer: str,
    overrides: tuple[str, ...],
    device: str,
    batch_size: int,
    force: bool,
    from_bank: bool,
    kind: IndexKind,
    out: Path,
) -> None:
    """Write a FAISS index over the embeddings of any images, or over the bank.

    RUN is a run directory (its newest checkpoint) or a checkpoint directory. The index holds unit vectors and compares
    them by inner product, so that a search returns cosine similarities and image ids. Names and labels of the images
    are written to FILE.images.parquet. The path of the index is printed to stdout, Python code that searches it to
    stderr.
    """
    check_images(data, split)
    given = [
        name for name in _FOR_IMAGES if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if from_bank and given:
        option = {"layer": "features"}.get(given[0], given[0].replace("_", "-"))
        raise click.UsageError(f"--from-bank embeds no images; leave out --{option}")

    from msf_faiss.embeddings.files import images_table, refuse_existing
    from msf_faiss.embeddings.index import index_bank, index_data, search_snippet
    from msf_faiss.text import printable

    refuse_existing([out, images_table(out)], force=force)  # before a large data set is opened
    if from_bank:
        facts = index_bank(run, out, overrides=overrides, kind=kind, force=force)
    else:
        embedder = open_images(run, data, split, encoder, layer, overrides, device)
        with progress(len(embedder.source)) as on_batch:
            facts = index_data(embedder, out, kind=kind, batch_size=batch_size, force=force, on_batch=on_batch)
        if skipped := len(embedder.source) - facts.entries:
            say(f"skipped {skipped:,} unreadable images")
    accuracy = "exact"
    if facts.recall is not None:
        accuracy = f"recall@10 {facts.recall:.1%} probing {facts.probes:,} of {facts.lists:,} lists"
    say(f"{facts.entries:,} entries of {facts.dim} dimensions, {accuracy}; names in {printable(images_table(out))}\n")
    say(search_snippet(out, facts))
    click.echo(os.fsencode(out))
