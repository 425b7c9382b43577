"""Import libraries that only some kinds of data need."""

import importlib
from typing import Any

from msf_faiss.errors import UserError


def import_optional(name: str, kind: str) -> Any:
    """The module `name`, which data of this kind need.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"data.kind={kind} needs the package {package}: pip install 'msf-faiss[{kind}]'") from error
