"""Embeddings of a data set on disk: a Parquet table, or a NumPy array with a table of its images beside it.

    embeddings.parquet                              id, name, label, class, embedding: a row an image
    embeddings.npy, embeddings.npy.images.parquet   [N, F]; id, name, label, class of its rows, in their order

Both are written as batches come, so that any number of images fit, and appear when they are complete.

Shapes: N images, B of a batch, F numbers of an embedding.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import msf_faiss
from msf_faiss.checkpoint.format import Checkpoint, find_checkpoint
from msf_faiss.checkpoint.load import EncoderName, load_encoder
from msf_faiss.config import Config
from msf_faiss.config.load import override_config
from msf_faiss.data.source import Source
from msf_faiss.data.sources.detect import data_at
from msf_faiss.data.sources.open import open_source
from msf_faiss.embeddings.extract import stream
from msf_faiss.errors import UserError
from msf_faiss.files import atomic_paths
from msf_faiss.search.faiss_setup import set_threads
from msf_faiss.text import printable

FORMAT = "msf-faiss embeddings"
VERSION = 1
METADATA = b"msf_faiss"
"""Key of the facts about the embeddings, as JSON, in the metadata of a table's schema."""

Part = Literal["backbone", "projector"]
"""The backbone's features, or what the projector makes of them; the bank holds the target's of these, normalised."""
Number = Literal["float32", "float16"]

_GROUP = 64 << 20  # bytes of embeddings in a row group: small enough to hold, large enough for few of them
_SETTABLE = ("data.", "views.", "train.threads=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedder:
    """An encoder of a checkpoint, and the images that it is to embed."""

    checkpoint: Checkpoint
    config: Config  # the checkpoint's, with other data or views where asked
    device: torch.device
    source: Source
    network: nn.Module  # [B, 3, S, S] normalised views -> [B, F] on the device, frozen, in eval mode
    encoder: EncoderName
    part: Part
    dim: int  # F

    def batches(self, *, normalize: bool, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Embeddings [B, F] float32 and ids [B] int64 of all images that can be read, in their order.

        Raises:
            UserError: if an image is unreadable (see `features.stream`), or an embedding is not finite.
        """
        for batch in stream(self.network, self.source, config=self.config, device=self.device, batch_size=batch_size):
            finite = batch.embeddings.isfinite().all(dim=1)
            if not finite.all():
                raise UserError(
                    f"the embedding of {printable(self.source.name(int(batch.ids[~finite][0])))} is not finite: "
                    "training has diverged; take an earlier checkpoint, or train with a lower optimizer.learning_rate"
                )
            yield F.normalize(batch.embeddings, dim=1) if normalize else batch.embeddings, batch.ids

    def facts(self, *, normalized: bool, dtype: Number) -> dict[str, Any]:
        """What the embeddings are, for programs."""
        views = self.config.views
        return {
            "format": FORMAT,
            "version": VERSION,
            "encoder": self.encoder,
            "features": self.part,
            "dimensions": self.dim,
            "normalized": normalized,
            "dtype": dtype,
            **weights_of(self.checkpoint),
            "view": {
                "resize": views.resize,
                "center_crop": views.size,
                "mean": list(views.mean),
                "std": list(views.std),
            },
            "msf_faiss": msf_faiss.__version__,
        }


def weights_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which weights a checkpoint holds."""
    return {
        "checkpoint": checkpoint.path.name,
        "model_sha256": checkpoint.files["model.safetensors"],
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
    }


def open_embedder(
    path: Path,
    *,
    data: Path | None = None,
    overrides: Sequence[str] = (),
    split: Literal["train", "test"] = "train",
    encoder: EncoderName = "online",
    part: Part = "backbone",
    device: torch.device | None = None,
) -> Embedder:
    """Open a run's newest checkpoint, or a checkpoint, and images; torch and FAISS get the config's threads.

    Args:
        path: run or checkpoint directory.
        data: the images (see `data.guess.data_at`); None: those of the config.
        overrides: `data.key=value`, `views.key=value` or `train.threads=n`, changes to the checkpoint's config.
        split: training or held-out images.
        encoder: whose embeddings.
        part: before or after the projector.
        device: where to embed; None: the CPU.

    Raises:
        UserError: if the checkpoint or the data cannot be used, or an override touches anything else.
    """
    device = device or torch.device("cpu")
    checkpoint = find_checkpoint(path)
    config = inputs_of(checkpoint, data, overrides, device)
    source = open_source(config.data, split)
    if source is None:
        raise UserError(
            "the config names no held-out images; name them with --set data.test_path=… (with data.kind=huggingface: "
            "data.test_split), or images of any kind with --data"
        )
    whole = load_encoder(checkpoint, encoder)
    return Embedder(
        checkpoint=checkpoint,
        config=config,
        device=device,
        source=source,
        network=(whole if part == "projector" else whole.backbone).to(device),
        encoder=encoder,
        part=part,
        dim=whole.dim if part == "projector" else whole.feature_dim,
    )


def inputs_of(checkpoint: Checkpoint, data: Path | None, overrides: Sequence[str], device: torch.device) -> Config:
    """A checkpoint's config with other data and views; its threads are given to torch and FAISS. See `open_embedder`.

    Raises:
        UserError: if there are no data at `data`, or an override touches anything else.
    """
    for override in overrides:
        if not override.startswith(_SETTABLE):
            raise UserError(
                f"--set {override}: the encoder is taken as it was trained; only data.…, views.… and train.threads can "
                "be set"
            )
    config = checkpoint.config
    if data is not None:
        config = config.model_copy(update={"data": data_at(data, config.data)})
    if overrides:
        config = override_config(config, overrides)
    if config.train.threads is not None:
        set_threads(config.train.threads)
    return config


def embed(
    embedder: Embedder,
    out: Path,
    *,
    normalize: bool = False,
    dtype: Number = "float32",
    batch_size: int = 256,
    force: bool = False,
    on_batch: Callable[[int], None] = lambda done: None,
) -> int:
    """Write the embeddings of all images that can be read.

    Args:
        embedder: encoder and images.
        out: a file that ends in .parquet or .npy.
        normalize: to unit norm.
        dtype: of the numbers on disk; they are computed in float32.
        batch_size: images embedded at a time.
        force: let an older file give way.
        on_batch: told how many images are done.

    Returns:
        How many rows were written.

    Raises:
        UserError: if `out` has another ending, or is there already, or cannot be written; or an image is unreadable.
    """
    files = files_of(out)
    refuse_existing(files, force=force)
    done = 0
    facts = embedder.facts(normalized=normalize, dtype=dtype)
    # Python opens the files: Arrow opens none whose name is not UTF-8.
    with writing(out), atomic_paths(*files) as names, contextlib.ExitStack() as opened:
        handles = [opened.enter_context(name.open("wb")) for name in names]
        array = None
        if out.suffix == ".npy":
            array = opened.enter_context(ArrayFile(handles[0], embedder.dim, dtype))
        column = None if array else (embedder.dim, dtype)
        table = opened.enter_context(TableFile(handles[-1], embedder.source, facts, embedding=column))
        for embeddings, ids in embedder.batches(normalize=normalize, batch_size=batch_size):
            rows = as_numbers(embeddings, dtype)
            if array:
                array.write(rows)
            table.write(ids.numpy(), {} if array else {"embedding": rows})
            done += len(rows)
            on_batch(done)
    return done


def files_of(out: Path) -> list[Path]:
    """The files that `embed` writes.

    Raises:
        UserError: if `out` ends in neither .parquet nor .npy.
    """
    if out.suffix not in (".parquet", ".npy"):
        raise UserError(f"--out {printable(out)}: the ending says what to write: .parquet is a table, .npy an array")
    return [out] if out.suffix == ".parquet" else [out, images_table(out)]


def images_table(path: Path) -> Path:
    """The table of names and labels beside an array or an index."""
    return path.with_name(f"{path.name}.images.parquet")


def refuse_existing(files: Sequence[Path], *, force: bool) -> None:
    """Before hours are spent on what would not be written.

    Raises:
        UserError: if one of the files is there already, unless `force`; or if one is a folder.
    """
    for path in files:
        if path.is_dir():
            raise UserError(f"{printable(path)} is a folder; name a file with --out")
        if path.exists() and not force:
            raise UserError(f"{printable(path)} is there already; name another file with --out, or replace it: --force")


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what the disk causes into words.

    Raises:
        UserError: for an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{printable(out)}: cannot be written: {error.strerror or error}; make room there, or choose another --out"
        ) from error


def as_numbers(embeddings: Tensor, dtype: Number) -> NDArray[Any]:
    """[B, F] in the type of numbers that the file has.

    Raises:
        UserError: if float16 does not hold one.
    """
    rows = embeddings.to(getattr(torch, dtype)).contiguous()
    if not rows.isfinite().all():
        raise UserError("the embeddings have numbers beyond 65,504, which float16 does not hold; leave out --dtype")
    return rows.numpy()


class ArrayFile:
    """An array [N, F] that grows by rows in a file, as .npy; complete when its context ends well.

    Plain writes rather than a memory map: on a full disk a map ends the process (SIGBUS), a write raises OSError.
    """

    def __init__(self, file: BinaryIO, dim: int, dtype: Number) -> None:
        self._file, self._dim, self._dtype, self._rows = file, dim, np.dtype(dtype), 0
        self._header()

    def __enter__(self) -> ArrayFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._file.seek(0)
            self._header()

    def write(self, rows: NDArray[Any]) -> None:
        """Add rows [B, F]."""
        self._file.write(rows.astype(self._dtype, copy=False).tobytes())
        self._rows += len(rows)

    def _header(self) -> None:
        # NumPy leaves room for a first axis of any length, so that the final header has the first one's size.
        shape = (self._rows, self._dim)
        described = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, described)


class TableFile:
    """A Parquet table of images, in row groups as they come: `id`, `name`, `label` and `class` where there are classes,
    and further columns.

    Complete when its context ends well.

    Args:
        file: to write to.
        source: names and labels come from it.
        facts: go into the schema's metadata.
        embedding: dimensions and type of a column `embedding`; None: no such column.
        columns: further columns, by name.
    """

    def __init__(
        self,
        file: BinaryIO,
        source: Source,
        facts: Mapping[str, Any],
        *,
        embedding: tuple[int, Number] | None = None,
        columns: Mapping[str, pa.DataType] = {},
    ) -> None:
        self._source = source
        self._classes = None if source.classes is None else [printable(name) for name in source.classes]
        fields = [pa.field("id", pa.int64(), nullable=False), pa.field("name", pa.string(), nullable=False)]
        if source.labels is not None:
            fields += [pa.field("label", pa.int64()), pa.field("class", pa.string())]
        fields += [pa.field(name, kind, nullable=False) for name, kind in columns.items()]
        self._most = 1 << 16
        if embedding is not None:
            dim, dtype = embedding
            value = pa.field("element", pa.from_numpy_dtype(np.dtype(dtype)), nullable=False)
            fields.append(pa.field("embedding", pa.list_(value, dim), nullable=False))
            self._most = max(1, _GROUP // (dim * np.dtype(dtype).itemsize))
        self._schema = pa.schema(fields, {METADATA: json.dumps(facts)})
        self._waiting: list[pa.RecordBatch] = []
        # Embeddings neither compress nor repeat.
        wordy = [field.name for field in fields if field.name != "embedding"]
        self._writer = pq.ParquetWriter(
            file, self._schema, compression=dict.fromkeys(wordy, "zstd"), use_dictionary=["class"]
        )

    def __enter__(self) -> TableFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
            self._writer.close()
        else:
            with contextlib.suppress(OSError):
                self._writer.close()

    def write(self, ids: NDArray[np.int64], columns: Mapping[str, NDArray[Any]]) -> None:
        """Add rows for images `ids` [B]; `columns` [B, ...] are those that do not come from the source."""
        values: dict[str, Any] = {
            "id": pa.array(ids),
            "name": pa.array([printable(self._source.name(index)) for index in ids.tolist()], pa.string()),
        }
        if self._source.labels is not None:
            labels = self._source.labels[ids]
            values["label"] = pa.array(labels, mask=labels < 0)
            names = self._classes or []
            values["class"] = pa.array(
                [names[label] if 0 <= label < len(names) else None for label in labels.tolist()], pa.string()
            )
        for name, column in columns.items():
            kind = self._schema.field(name).type
            flat = pa.array(column.reshape(-1))
            nested = pa.types.is_fixed_size_list(kind)
            values[name] = pa.FixedSizeListArray.from_arrays(flat, type=kind) if nested else flat
        self._waiting.append(pa.record_batch([values[field.name] for field in self._schema], schema=self._schema))
        if sum(map(len, self._waiting)) >= self._most:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            rows = pa.Table.from_batches(self._waiting, self._schema)
            self._writer.write_table(rows, row_group_size=max(self._most, len(rows)))
        self._waiting = []
