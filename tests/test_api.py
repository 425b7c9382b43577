"""The public names of `import msf_faiss`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import msf_faiss

EVENTS = {
    *(
        "RunStarted",
        "CachingImages",
        "TimeEstimated",
        "TrainingProgress",
        "KnnEvaluated",
        "CheckpointSaved",
        "BankAdjusted",
    ),
    *("CollapseDetected", "StepProfiled", "RunEnded"),
}


def test_public_names_are_complete() -> None:
    functions = {"create_bank", "embed", "knn", "load_config", "load_encoder", "pretrain"}
    assert set(dir(msf_faiss)) == functions | EVENTS | {"Event", "UserError", "__version__"}
    assert {event.__name__ for event in msf_faiss.Event.__args__} == EVENTS
    for name in functions:
        assert callable(getattr(msf_faiss, name))
    with pytest.raises(AttributeError, match="no attribute 'load_banana'"):
        msf_faiss.load_banana  # noqa: B018


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(msf_faiss.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = {alias.asname: node.module for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert imports == {name: f"msf_faiss.{module}" for name, module in msf_faiss._MODULES.items()}


def test_import_loads_no_torch() -> None:
    code = "import sys, msf_faiss; msf_faiss.RunEnded, msf_faiss.UserError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
