"""Embed the images of a data set with a checkpoint's encoder, and write the embeddings to files.

    FILE.parquet                     id, name, label, class, embedding; one row per image
    FILE.npy                         [N, F]
    FILE.npy.images.parquet          id, name, label, class of each row of the array

Files are written batch by batch, so that any number of images fits, and atomically.

Shapes: N images, B of a batch, F dimensions of an embedding.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import msf_faiss
from msf_faiss.checkpoint.format import Checkpoint
from msf_faiss.config import Config
from msf_faiss.data.source import Source
from msf_faiss.embeddings.encoder import TrainedEncoder
from msf_faiss.embeddings.extract import Features, describe_view, extract, extract_batches
from msf_faiss.embeddings.files import ArrayFile, Dtype, TableFile, images_table, refuse_existing, write_errors
from msf_faiss.embeddings.inputs import Split, open_inputs, override_inputs
from msf_faiss.errors import UserError
from msf_faiss.files import atomic_paths
from msf_faiss.text import printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedder:
    """An encoder, and the images to embed with it."""

    encoder: TrainedEncoder
    config: Config  # the checkpoint's, with overrides of data and views
    source: Source

    def batches(self, *, normalize: bool, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Embeddings [B, F] float32 and ids [B] int64 of all readable images, in order.

        Raises:
            UserError: as `extract` does.
        """
        for batch in extract_batches(
            self.encoder, self.source, config=self.config, device=self.encoder.device, batch_size=batch_size
        ):
            yield F.normalize(batch.embeddings, dim=1) if normalize else batch.embeddings, batch.ids

    def describe(self, *, normalized: bool, dtype: Dtype) -> dict[str, Any]:
        """The embeddings' origin and format, as metadata of a file."""
        return {
            "format": "msf-faiss embeddings",
            "version": 1,
            "encoder": self.encoder.name,
            "features": "projector" if self.encoder.projector else "backbone",
            "dimensions": self.encoder.dim,
            "normalized": normalized,
            "dtype": dtype,
            **describe_weights(self.encoder.checkpoint),
            "view": describe_view(self.config.views),
            "msf_faiss": msf_faiss.__version__,
        }


def describe_weights(checkpoint: Checkpoint) -> dict[str, Any]:
    """The origin of a checkpoint's weights, as metadata of a file."""
    return {
        "checkpoint": checkpoint.path.name,
        "model_sha256": checkpoint.files["model.safetensors"],
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
    }


@overload
def embed(
    encoder: TrainedEncoder,
    images: Path | str | Sequence[Image.Image | Tensor | Path | str] | None = None,
    *,
    split: Split = "train",
    overrides: Sequence[str] = (),
    normalize: bool = False,
    batch_size: int = 256,
) -> Features: ...


@overload
def embed(
    encoder: TrainedEncoder,
    images: Path | str | None = None,
    *,
    split: Split = "train",
    overrides: Sequence[str] = (),
    normalize: bool = False,
    batch_size: int = 256,
    out: Path | str,
) -> int: ...


def embed(
    encoder: TrainedEncoder,
    images: Path | str | Sequence[Image.Image | Tensor | Path | str] | None = None,
    *,
    split: Split = "train",
    overrides: Sequence[str] = (),
    normalize: bool = False,
    batch_size: int = 256,
    out: Path | str | None = None,
) -> Features | int:
    """Embed images with one centre crop each, as the evaluations do.

    Args:
        encoder: see `load_encoder`.
        images: a list of images, each as `TrainedEncoder.preprocess` takes it; or the path of a data set (a folder of
            images, a .parquet or .tar file, or a folder of those); or None: the data set of the encoder's training.
        split: with `images` None, the training or the held-out images.
        overrides: for a data set, changes to the config, such as "data.unreadable=skip"; see `inputs.override_inputs`.
        normalize: scale embeddings to unit norm.
        batch_size: images per batch.
        out: a new .parquet or .npy file to write a data set's embeddings to; None: return them.

    Returns:
        The embeddings of all readable images, with their labels and ids; or, with `out`, how many were written.

    Raises:
        UserError: if an image or the data set cannot be read, `out` exists or cannot be written, or an embedding is not
            finite.
    """
    if isinstance(images, str | Path | None):
        embedder = open_embedder(encoder, None if images is None else Path(images), overrides=overrides, split=split)
        if out is not None:
            return write_embeddings(embedder, Path(out), normalize=normalize, batch_size=batch_size)
        features = extract(
            encoder, embedder.source, config=embedder.config, device=encoder.device, batch_size=batch_size
        )
    else:
        if out is not None:
            raise ValueError("only the embeddings of a data set can be written to a file: pass its path")
        batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        views = (torch.stack([encoder.preprocess(image) for image in batch]) for batch in batches)
        parts = [encoder(batch.to(encoder.device)).cpu() for batch in views]
        features = Features(torch.cat([torch.empty(0, encoder.dim), *parts]), None, torch.arange(len(images)))
    return features._replace(embeddings=F.normalize(features.embeddings, dim=1)) if normalize else features


def open_embedder(
    encoder: TrainedEncoder,
    data: Path | None = None,
    *,
    overrides: Sequence[str] = (),
    split: Split = "train",
) -> Embedder:
    """Open images to embed.

    Args:
        encoder: see `load_encoder`.
        data: path of the images; None: those of the checkpoint's config.
        overrides: changes to the config, see `inputs.override_inputs`.
        split: training or held-out images.

    Raises:
        UserError: if the data cannot be read, or an override changes more than data and views.
    """
    config = override_inputs(encoder.checkpoint.config, overrides, data)
    return Embedder(encoder=encoder, config=config, source=open_inputs(config, split))


def write_embeddings(
    embedder: Embedder,
    out: Path,
    *,
    normalize: bool = False,
    dtype: Dtype = "float32",
    batch_size: int = 256,
    force: bool = False,
    on_batch: Callable[[int], None] = lambda done: None,
) -> int:
    """Write the embeddings of all readable images; returns the number of rows.

    Args:
        embedder: encoder and images.
        out: a .parquet or .npy file.
        normalize: scale embeddings to unit norm.
        dtype: of the file; embeddings are computed in float32.
        batch_size: images per batch.
        force: replace existing files.
        on_batch: called with the number of images done so far.

    Raises:
        UserError: if `out` has another extension, exists or cannot be written, an image is unreadable, or an embedding
            is not finite.
    """
    files = output_files(out)
    refuse_existing(files, force=force)
    done = 0
    metadata = embedder.describe(normalized=normalize, dtype=dtype)
    # Files are opened by Python, since Arrow cannot open a name that is not UTF-8.
    with write_errors(out), atomic_paths(*files) as paths, contextlib.ExitStack() as stack:
        handles = [stack.enter_context(path.open("wb")) for path in paths]
        dim = embedder.encoder.dim
        array = stack.enter_context(ArrayFile(handles[0], dim, dtype)) if out.suffix == ".npy" else None
        column = None if array else (dim, dtype)
        table = stack.enter_context(TableFile(handles[-1], embedder.source, metadata, embedding=column))
        for embeddings, ids in embedder.batches(normalize=normalize, batch_size=batch_size):
            rows = _cast(embeddings, dtype)
            if array:
                array.write(rows)
            table.write(ids.numpy(), {} if array else {"embedding": rows})
            done += len(rows)
            on_batch(done)
    return done


def output_files(out: Path) -> list[Path]:
    """The files that `write_embeddings` writes.

    Raises:
        UserError: if `out` is neither a .parquet nor a .npy file.
    """
    if out.suffix not in (".parquet", ".npy"):
        raise UserError(f"--out {printable(out)}: the extension must be .parquet (a table) or .npy (an array)")
    return [out] if out.suffix == ".parquet" else [out, images_table(out)]


def _cast(embeddings: Tensor, dtype: Dtype) -> NDArray[Any]:
    rows = embeddings.to(getattr(torch, dtype)).contiguous()
    if not rows.isfinite().all():
        raise UserError("some embeddings exceed 65,504, the range of float16; leave out --dtype")
    return rows.numpy()
