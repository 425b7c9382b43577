"""An encoder as an ONNX graph, checked against the network that it came from.

Shapes: B images, S height and width of a view, F features.
"""

from __future__ import annotations

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

from msf_faiss.errors import UserError
from msf_faiss.export.encoder import ExportedEncoder

FILE = "model.onnx"
INPUT, OUTPUT = "images", "features"
OPSET = 18
"""Of the operators' definitions; the one that torch's exporter itself writes, so that nothing is converted."""
TOLERANCE = 1e-4
"""Largest difference to the network's features that is accepted, relative to their norm. Batch norms are folded into
the convolutions, and sums have another order: float32 rounding (6e-8) of some fifty layers, 1e-6 to 1e-5."""


def write_onnx(encoder: ExportedEncoder, folder: Path, facts: dict[str, Any]) -> float:
    """model.onnx: `images` [B, 3, S, S] float32, normalised, to `features` [B, F], for any B; one file.

    onnx checks it, and onnxruntime gives what the network gives.

    Args:
        encoder: its network.
        folder: to write to.
        facts: go into the model's metadata, by name; what is no text, as JSON.

    Returns:
        The largest difference between onnxruntime's features and the network's, relative to these.

    Raises:
        UserError: if a library is missing, or the check finds a difference.
        OSError: if the file cannot be written.
    """
    onnx, onnxruntime = _libraries()
    size = encoder.views.size
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
        for name, value in facts.items():
            program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
        model = program.model_proto
    graph = model.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]  # stack traces, with the paths of this machine
    content = model.SerializeToString()  # the largest of our networks has 0.5 GB, a file may have 2
    onnx.checker.check_model(content, full_check=True)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = 0.0
    with torch.no_grad():
        for batch in (images, images[:1]):  # other numbers of images than the one that was traced
            expected = encoder.network(batch).numpy()
            found = session.run([OUTPUT], {INPUT: batch.numpy()})[0]
            norms = np.linalg.norm(expected, axis=1).clip(min=1e-12)
            difference = max(difference, float((np.linalg.norm(found - expected, axis=1) / norms).max()))
    if not difference <= TOLERANCE:
        raise UserError(
            f"--format onnx: onnxruntime {onnxruntime.__version__} gives other features than the network (relative "
            f"difference {difference:.1e}, accepted {TOLERANCE:.0e}); choose another --format"
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
    """Keep what the exporter says of its own progress and plans from the user's streams."""
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
