"""A FAISS index over the embeddings of a data set, or over a checkpoint's bank, for search outside.

index.faiss                   of unit vectors, by inner product, under the images' ids
index.faiss.images.parquet    id, name, label, class of each entry, in the order of the index; of a bank, its age too
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.checkpoint.load import load_bank
from msf_faiss.data.sources.open import open_source
from msf_faiss.embeddings.embedder import (
    ArrayFile,
    Embedder,
    TableFile,
    images_table,
    inputs_of,
    refuse_existing,
    weights_of,
    writing,
)
from msf_faiss.errors import UserError
from msf_faiss.files import atomic_paths
from msf_faiss.search.index_file import IndexFacts, IndexKind, write_index

_FORMAT, _VERSION = "msf-faiss index", 1


def index_data(
    embedder: Embedder,
    out: Path,
    *,
    kind: IndexKind = "flat",
    batch_size: int = 256,
    force: bool = False,
    on_batch: Callable[[int], None] = lambda done: None,
) -> IndexFacts:
    """Write an index of all images that can be read, and the table of them beside it.

    While images are embedded a temporary folder beside `out` holds their embeddings, so that inverted lists are made
    from a sample of all; memory holds the index alone.

    Args:
        embedder: encoder and images.
        out: the index's file.
        kind: exact, or how approximate.
        batch_size: images embedded at a time.
        force: let older files give way.
        on_batch: told how many images are done.

    Raises:
        UserError: if a file is there already or cannot be written, or an image is unreadable.
    """
    table = images_table(out)
    refuse_existing([out, table], force=force)
    facts = embedder.facts(normalized=True, dtype="float32") | {"format": _FORMAT, "version": _VERSION, "kind": kind}
    ids: list[NDArray[np.int64]] = []
    done = 0
    with (
        writing(out),
        atomic_paths(out, table) as (index_name, table_name),
        tempfile.TemporaryDirectory(prefix=".msf-faiss-", dir=out.parent) as folder,
    ):
        spool = Path(folder) / "embeddings.npy"
        with (
            spool.open("wb") as spool_file,
            table_name.open("wb") as table_file,
            ArrayFile(spool_file, embedder.dim, "float32") as array,
            TableFile(table_file, embedder.source, facts) as images,
        ):
            for embeddings, batch in embedder.batches(normalize=True, batch_size=batch_size):
                array.write(embeddings.numpy())
                images.write(batch.numpy(), {})
                ids.append(batch.numpy())
                done += len(batch)
                on_batch(done)
        seed = embedder.checkpoint.config.seed
        return write_index(index_name, np.load(spool, mmap_mode="r"), np.concatenate(ids), kind=kind, seed=seed)


def index_bank(
    path: Path, out: Path, *, overrides: Sequence[str] = (), kind: IndexKind = "flat", force: bool = False
) -> IndexFacts:
    """Write an index of a checkpoint's bank, oldest entry first, and the table of its entries beside it.

    The entries are those that training searched, under the ids of their images; an image that was pushed more than once
    has as many entries, and `reconstruct` takes the newest.

    Args:
        path: run or checkpoint directory.
        out: the index's file.
        overrides: where the training data are, if they have moved: names and labels come from there.
        kind: exact, or how approximate.
        force: let older files give way.

    Raises:
        UserError: if the bank is empty or belongs to other data, a file is there already, or something cannot be read
            or written.
    """
    table = images_table(out)
    refuse_existing([out, table], force=force)
    checkpoint, device = find_checkpoint(path), torch.device("cpu")
    source = open_source(inputs_of(checkpoint, None, overrides, device).data, "train")
    assert source is not None, "every config names training data"
    if len(source) != checkpoint.dataset_size:
        raise UserError(
            f"{checkpoint.path}: its bank names {checkpoint.dataset_size:,} images by their number, but the data now "
            f"hold {len(source):,}; give the data of the training with --set data.…"
        )
    bank = load_bank(checkpoint, device)
    slots = bank.newest(len(bank))
    if not len(slots):
        raise UserError(f"{checkpoint.path}: its bank is empty; index a data set instead: leave out --from-bank")
    ids = bank.ids(slots).numpy()
    facts = {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": kind,
        "encoder": "target",
        "features": "projector",
        "dimensions": bank.dim,
        "normalized": True,
        "entries_of": "the bank",
        **weights_of(checkpoint),
    }
    with writing(out), atomic_paths(out, table) as (index_name, table_name):
        with table_name.open("wb") as file, TableFile(file, source, facts, columns={"age": pa.int64()}) as images:
            images.write(ids, {"age": bank.age(slots).numpy()})
        return write_index(index_name, bank.reconstruct(slots).numpy(), ids, kind=kind, seed=checkpoint.config.seed)


def usage(out: Path, facts: IndexFacts) -> str:
    """Python that searches the index, for people to copy."""
    probes = ""
    if facts.probes is not None:
        probes = f"\nfaiss.extract_index_ivf(index).nprobe = {facts.probes}  # of {facts.lists} lists; more find more"
    return f"""\
import faiss, pyarrow.parquet
index = faiss.read_index({str(out)!r}){probes}
images = pyarrow.parquet.read_table({str(images_table(out))!r})  # rows in the index's order
names = dict(zip(images["id"].to_pylist(), images["name"].to_pylist()))
similarities, ids = index.search(queries, 10)  # queries: float32 [n, {facts.dim}] of unit norm"""
