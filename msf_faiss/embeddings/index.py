"""Write a FAISS index over the embeddings of a data set, or over a checkpoint's bank.

FILE.faiss                    unit vectors, compared by inner product, under the images' ids
FILE.faiss.images.parquet     id, name, label, class of each entry, in the order of the index; of a bank also age
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from msf_faiss.checkpoint.format import find_checkpoint
from msf_faiss.checkpoint.load import load_bank
from msf_faiss.device import CPU
from msf_faiss.embeddings.embedder import Embedder, describe_weights
from msf_faiss.embeddings.files import ArrayFile, TableFile, images_table, refuse_existing, write_errors
from msf_faiss.embeddings.inputs import check_bank_images, open_inputs, override_inputs
from msf_faiss.errors import UserError
from msf_faiss.files import atomic_paths
from msf_faiss.search.index_file import IndexFacts, IndexKind, write_index

_FORMAT = {"format": "msf-faiss index", "version": 1}


def index_data(
    embedder: Embedder,
    out: Path,
    *,
    kind: IndexKind = "flat",
    batch_size: int = 256,
    force: bool = False,
    on_batch: Callable[[int], None] = lambda done: None,
) -> IndexFacts:
    """Write an index of all readable images, and the table of their names.

    Embeddings are spooled to a temporary folder next to `out`, so that inverted lists are trained on a sample of all
    of them while only the index is in memory.

    Args:
        embedder: encoder and images.
        out: the index file.
        kind: of the index.
        batch_size: images per batch.
        force: replace existing files.
        on_batch: called with the number of images done so far.

    Raises:
        UserError: if a file exists or cannot be written, or an image is unreadable.
    """
    table = images_table(out)
    refuse_existing([out, table], force=force)
    metadata = embedder.describe(normalized=True, dtype="float32") | _FORMAT | {"kind": kind}
    ids: list[NDArray[np.int64]] = []
    done = 0
    with (
        write_errors(out),
        atomic_paths(out, table) as (index_path, table_path),
        tempfile.TemporaryDirectory(prefix=".msf-faiss-", dir=out.parent) as folder,
    ):
        spool = Path(folder) / "embeddings.npy"
        with (
            spool.open("wb") as spool_file,
            table_path.open("wb") as table_file,
            ArrayFile(spool_file, embedder.encoder.dim, "float32") as array,
            TableFile(table_file, embedder.source, metadata) as images,
        ):
            for embeddings, batch in embedder.batches(normalize=True, batch_size=batch_size):
                array.write(embeddings.numpy())
                images.write(batch.numpy())
                ids.append(batch.numpy())
                done += len(batch)
                on_batch(done)
        seed = embedder.encoder.checkpoint.config.seed
        return write_index(index_path, np.load(spool, mmap_mode="r"), np.concatenate(ids), kind=kind, seed=seed)


def index_bank(
    path: Path, out: Path, *, overrides: Sequence[str] = (), kind: IndexKind = "flat", force: bool = False
) -> IndexFacts:
    """Write an index of a checkpoint's bank, oldest entry first, and the table of its entries.

    Entries are indexed under the ids of their images. An image with several entries is found once for each of them;
    FAISS's `reconstruct` returns its newest.

    Args:
        path: run or checkpoint directory.
        out: the index file.
        overrides: changes to the config's data, if they have moved; names and labels are read from there.
        kind: of the index.
        force: replace existing files.

    Raises:
        UserError: if the bank is empty or refers to other data, a file exists, or something cannot be read or written.
    """
    table = images_table(out)
    refuse_existing([out, table], force=force)
    checkpoint = find_checkpoint(path)
    source = open_inputs(override_inputs(checkpoint.config, overrides))
    check_bank_images(checkpoint, source)
    bank = load_bank(checkpoint, CPU)
    slots = bank.newest(len(bank))
    if not len(slots):
        raise UserError(f"{checkpoint.path}: the bank is empty; leave out --from-bank to index images")
    ids = bank.ids(slots).numpy()
    metadata = {
        **_FORMAT,
        "kind": kind,
        "encoder": "target",
        "features": "projector",
        "dimensions": bank.dim,
        "normalized": True,
        "entries_of": "the bank",
        **describe_weights(checkpoint),
    }
    with write_errors(out), atomic_paths(out, table) as (index_path, table_path):
        with table_path.open("wb") as file, TableFile(file, source, metadata, columns={"age": pa.int64()}) as images:
            images.write(ids, {"age": bank.age(slots).numpy()})
        return write_index(index_path, bank.reconstruct(slots).numpy(), ids, kind=kind, seed=checkpoint.config.seed)


def search_snippet(out: Path, facts: IndexFacts) -> str:
    """Python code that searches the index."""
    probes = ""
    if facts.probes is not None:
        probes = (
            f"\nfaiss.extract_index_ivf(index).nprobe = {facts.probes}  # of {facts.lists} lists; more raise the recall"
        )
    return f"""\
import faiss, pyarrow.parquet
index = faiss.read_index({str(out)!r}){probes}
images = pyarrow.parquet.read_table({str(images_table(out))!r})  # one row per entry, in the index's order
names = dict(zip(images["id"].to_pylist(), images["name"].to_pylist()))
similarities, ids = index.search(queries, 10)  # queries: float32 [n, {facts.dim}], unit norm"""
