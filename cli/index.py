"""`msf-faiss index`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from .embed_options import options, progress, say

if TYPE_CHECKING:
    from msf_faiss.checkpoint.load import EncoderName
    from msf_faiss.embeddings.embedder import Part
    from msf_faiss.search.index_file import IndexKind

_ENCODING = ("data", "split", "encoder", "part", "device", "batch_size")


@click.command(short_help="Write a FAISS index over the embeddings of any images, or over the bank.")
@options
@click.option(
    "--from-bank", is_flag=True, help="Index the entries of the checkpoint's bank instead of embedding images."
)
@click.option(
    "--kind",
    type=click.Choice(["flat", "ivf", "ivf-sq8"]),
    default="flat",
    show_default=True,
    help="flat: exact; ivf: inverted lists, faster; ivf-sq8: those with a byte a number.",
)
@click.option("--out", required=True, metavar="FILE", type=click.Path(path_type=Path), help="The index's file.")
@click.pass_context
def command(
    context: click.Context,
    run: Path,
    data: Path | None,
    split: Literal["train", "test"] | None,
    encoder: EncoderName,
    part: Part,
    overrides: tuple[str, ...],
    device: str,
    batch_size: int,
    force: bool,
    from_bank: bool,
    kind: IndexKind,
    out: Path,
) -> None:
    """Write a FAISS index over the embeddings of any images, or over the bank.

    RUN is a run directory (its newest checkpoint) or a checkpoint directory. Embeddings have unit norm and are compared
    by inner product, so that a search gives cosines, and ids that are the images' numbers. Beside the index lies a
    table of the images' names and labels (FILE.images.parquet). The index's path goes to stdout, how to search it to
    stderr.
    """
    if data is not None and split is not None:
        raise click.UsageError("--data names the images; --split chooses among those of the run: give one of them")
    given = [name for name in _ENCODING if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    if from_bank and given:
        option = {"part": "features"}.get(given[0], given[0].replace("_", "-"))
        raise click.UsageError(f"--from-bank takes the entries as they are; leave out --{option}")

    from msf_faiss.device import select_device
    from msf_faiss.embeddings.embedder import images_table, open_embedder, refuse_existing
    from msf_faiss.embeddings.index import index_bank, index_data, usage
    from msf_faiss.text import printable

    refuse_existing([out, images_table(out)], force=force)  # before a large data set is opened
    if from_bank:
        facts = index_bank(run, out, overrides=overrides, kind=kind, force=force)
    else:
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
            facts = index_data(embedder, out, kind=kind, batch_size=batch_size, force=force, on_batch=on_batch)
        if skipped := len(embedder.source) - facts.entries:
            say(f"left out: {skipped:,} unreadable images")
    how = "exact"
    if facts.recall is not None:
        how = f"{facts.lists:,} lists, {facts.probes:,} probed: {facts.recall:.1%} of the 10 nearest are found"
    say(f"{facts.entries:,} entries of {facts.dim} numbers, {how}; their names: {printable(images_table(out))}\n")
    say(usage(out, facts))
    click.echo(os.fsencode(out))
