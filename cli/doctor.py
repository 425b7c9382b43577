"""`msf-faiss doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from msf_faiss.doctor import Diagnosis, Machine, Search

_ROWS = 65_536  # what the engines are timed on; see `time_engines`


@click.command(short_help="See what decides whether and how fast the bank works here.")
@click.option(
    "--dim",
    metavar="D",
    type=click.IntRange(1, 8192),
    default=512,
    show_default=True,
    help="Dimensions of an embedding.",
)
@click.option(
    "--batch",
    metavar="B",
    type=click.IntRange(1, 65_536),
    default=256,
    show_default=True,
    help="Queries in a search, as many as images in a step.",
)
@click.option(
    "--k",
    "-k",
    metavar="K",
    type=click.IntRange(1, 1024),
    default=5,
    show_default=True,
    help="Neighbours of each query.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Storage of an entry.",
)
@click.option(
    "--rows",
    metavar="N",
    type=click.IntRange(1, _ROWS),
    default=_ROWS,
    show_default=True,
    help="Entries that are searched; more take proportionally longer.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all that was found as JSON.")
def command(dim: int, batch: int, k: int, dtype: str, rows: int, as_json: bool) -> None:
    """See what decides whether and how fast the bank works here.

    Versions, processor and GPUs; the time of a search by each exact engine, on the device that training would use; and
    last what is wrong, with a remedy for each.
    """
    if k > rows:
        raise click.BadParameter(f"{k} neighbours are more than the {rows} entries of --rows.", param_hint="'--k'")
    from msf_faiss.errors import UserError

    try:
        import torch

        from msf_faiss.device import select_device
        from msf_faiss.doctor import diagnose
    except ImportError as error:
        if (error.name or "").startswith("msf_faiss"):
            raise
        raise UserError(
            f"a package that msf-faiss needs is missing or broken ({error}); install it again with "
            "pip install --force-reinstall"
        ) from error

    found = diagnose(device=select_device("auto"), dtype=getattr(torch, dtype), rows=rows, dim=dim, batch=batch, k=k)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        _show(found)


def _show(found: Diagnosis) -> None:
    from .console import stdout

    console = stdout()
    facts = _facts(found.machine)
    width = max(map(len, facts))
    for name, fact in facts.items():
        console.print(f"{name:<{width}}  {fact}", markup=False)
    console.print()
    if found.search.engine_ms:
        console.print(_timings(found.search), markup=False)
        console.print()
    for problem in found.problems:
        console.print(f"problem: {problem.what}\n  remedy: {problem.remedy}", markup=False)
    if not found.problems:
        console.print("no problems found", markup=False)


def _facts(machine: Machine) -> dict[str, str]:
    """What there is, as name and text."""
    versions = machine.versions
    wheels = " and ".join(machine.faiss_wheels) or "no wheel"
    threads = f"torch {machine.torch_threads}, FAISS {machine.faiss_threads}"
    facts = {
        "msf-faiss": versions["msf-faiss"],
        "python": f"{versions['python']} on {machine.system}",
        "torch": f"{versions['torch']}, torchvision {versions['torchvision']}, numpy {versions['numpy']}",
        "faiss": f"{versions['faiss']} from {wheels}, {'with' if machine.faiss_cuda else 'without'} CUDA",
        "BLAS": _blas(machine),
        "processor": f"{machine.cpu or 'model not known'}, {_instructions(machine)}",
        "cores": f"{machine.cores} for this process (threads: {threads})",
        "memory": "not known" if machine.memory is None else _gib(machine.memory),
    }
    for number, gpu in enumerate(machine.gpus):
        facts[f"GPU {number}"] = (
            f"{gpu.name}, {_gib(gpu.memory)}, capability {gpu.capability}, "
            f"{'usable' if gpu.faiss else 'not usable'} by FAISS"
        )
    return facts if machine.gpus else facts | {"GPU": "none that torch sees"}


def _blas(machine: Machine) -> str:
    match machine.blas_chosen_by:
        case "user":
            return f"{machine.blas or 'nothing'}, set by OPENBLAS_CORETYPE"
        case "msf-faiss":
            return f"{machine.blas}, chosen for this processor"
        case _:
            return "not known, OpenBLAS chose"


def _instructions(machine: Machine) -> str:
    if machine.cpu_flags is None:
        return "instruction sets not known"
    present = [name for name, there in machine.cpu_flags.items() if there]
    absent = [name for name, there in machine.cpu_flags.items() if not there]
    return ", ".join([*present, *([f"no {' or '.join(absent)}"] if absent else [])])


def _timings(search: Search) -> str:
    """A heading, and a line an engine."""
    lines = [
        f"a search of {search.rows:,} entries of {search.dim} {search.dtype} by {search.batch:,} queries, "
        f"k = {search.k}, on {search.device}:"
    ]
    for engine, ms in search.engine_ms.items():
        taken = "   bank.engine: auto takes it" if engine == search.engine else ""
        lines.append(f"  {engine:<8}{ms:>10,.2f} ms{taken}")
    return "\n".join(lines)


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
