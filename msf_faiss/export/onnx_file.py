"""An encoder as an ONNX graph, verified against the PyTorch network.

Shapes: B images, S height and width of a view, F features.
"""

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msf_faiss.embeddings.encoder import TrainedEncoder
from msf_faiss.errors import UserError

FILE = "model.onnx"
INPUT, OUTPUT = "images", "features"
OPSET = 18
"""Version of the operators: the one that torch's exporter writes natively, so that nothing is converted."""
TOLERANCE = 1e-4
"""Largest accepted difference between the features, relative to their norm. Batch norms are folded into convolutions
and sums are reordered: float32 rounding (6e-8) over some fifty layers gives 1e-6 to 1e-5."""


def write_onnx(encoder: TrainedEncoder, folder: Path, metadata: dict[str, Any]) -> float:
    """Write model.onnx, a single file: normalised `images` [B, 3, S, S] float32 -> `features` [B, F], for any B.

    The model passes onnx's checker, and onnxruntime computes the same features as PyTorch.

    Args:
        encoder: see `embeddings.encoder.load_encoder`.
        folder: to write to.
        metadata: of the model; values that are not strings are written as JSON.

    Returns:
        The largest difference between the features of onnxruntime and PyTorch, relative to their norm.

    Raises:
        UserError: if a library is missing, or the features differ.
        OSError: if the file cannot be written.
    """
    onnx, onnxruntime = _libraries()
    size = encoder.image_size
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with _silence(), torch.no_grad():
        program = torch.onnx.export(
            encoder.network,
            (images[:2],),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            opset_version=OPSET,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        assert program is not None
        for name, value in metadata.items():
            program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
        model = program.model_proto
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]  # stack traces, which contain paths of this machine
    content = model.SerializeToString()  # at most 0.5 GB; protobuf allows 2
    onnx.checker.check_model(content, full_check=True)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = 0.0
    with torch.no_grad():
        for batch in (images, images[:1]):  # other batch sizes than the traced one
            expected = encoder.network(batch).numpy()
            found = session.run([OUTPUT], {INPUT: batch.numpy()})[0]
            norms = np.linalg.norm(expected, axis=1).clip(min=1e-12)
            difference = max(difference, float((np.linalg.norm(found - expected, axis=1) / norms).max()))
    if not difference <= TOLERANCE:
        raise UserError(
            f"--format onnx: the features of onnxruntime {onnxruntime.__version__} differ from PyTorch's by "
            f"{difference:.1e} of their norm, more than {TOLERANCE:.0e}; use another --format"
        )
    (folder / FILE).write_bytes(content)
    return difference


def _libraries() -> tuple[Any, Any]:
    try:
        importlib.import_module("onnxscript")
        return importlib.import_module("onnx"), importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UserError(f"--format onnx needs {error.name}: pip install 'msf-faiss[onnx]'") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Suppress the progress output and warnings of torch's exporter."""
    level = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
