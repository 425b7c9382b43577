"""`msf-faiss doctor`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from msf_faiss.doctor import Machine, SearchTiming

_ROWS = 65_536  # what the engines are timed on; see `time_engines`


@click.command()
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
    help="Queries per search: the batch size of training.",
)
@click.option(
    "--k",
    "-k",
    metavar="K",
    type=click.IntRange(1, 1024),
    default=5,
    show_default=True,
    help="Neighbours per query.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Number format of the entries.",
)
@click.option(
    "--rows",
    metavar="N",
    type=click.IntRange(1, _ROWS),
    default=_ROWS,
    show_default=True,
    help="Number of entries; the time is proportional to it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def command(dim: int, batch: int, k: int, dtype: str, rows: int, as_json: bool) -> None:
    """Diagnose this machine: versions, GPUs, search speed, and problems with their remedies.

    Shows versions, processor and GPUs, the time of a search by each exact engine on the device that training would
    use, and finally the problems, each with its remedy.
    """
    if k > rows:
        raise click.BadParameter(f"{k} neighbours, but only {rows} entries (--rows).", param_hint="'--k'")
    from msf_faiss.errors import UserError

    try:
        import torch

        from msf_faiss.device import select_device
        from msf_faiss.doctor import find_problems, inspect_machine, time_search
    except ImportError as error:
        if (error.name or "").startswith("msf_faiss"):
            raise
        raise UserError(
            f"a required package is missing or broken ({error}); reinstall it with pip install --force-reinstall"
        ) from error

    machine, device = inspect_machine(), select_device("auto")
    search = time_search(device=device, dtype=getattr(torch, dtype), rows=rows, dim=dim, batch=batch, k=k)
    problems = list(find_problems(machine, search))
    if as_json:
        diagnosis = {"machine": asdict(machine), "search": asdict(search), "problems": [*map(asdict, problems)]}
        click.echo(json.dumps(diagnosis, indent=2))
        return
    from .console import stdout

    facts = _facts(machine)
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {fact}" for name, fact in facts.items()]
    lines += ["", *_timings(search)]
    lines += [f"problem: {problem.what}\n  remedy: {problem.remedy}" for problem in problems] or ["no problems found"]
    stdout().print("\n".join(lines), markup=False)


def _facts(machine: Machine) -> dict[str, str]:
    """Name and value of each line."""
    versions = machine.versions
    wheels = " and ".join(machine.faiss_wheels) or "no package"
    quota = "" if machine.cpu_quota is None else f", by a CPU quota of {machine.cpu_quota:g}"
    waiting = ", ".join(f"{name}={value}" for name, value in machine.waiting.items()) or "they spin"
    facts = {
        "msf-faiss": versions["msf-faiss"],
        "python": f"{versions['python']} on {machine.system}",
        "torch": f"{versions['torch']}, torchvision {versions['torchvision']}, numpy {versions['numpy']}",
        "faiss": f"{versions['faiss']} from {wheels}, {'with' if machine.faiss_cuda else 'without'} CUDA",
        "BLAS": _blas(machine),
        "processor": f"{machine.cpu or 'unknown model'}, {_instructions(machine)}",
        "cores": f"{machine.cores} available{quota}",
        "threads": f"torch {machine.torch_threads}, FAISS {machine.faiss_threads}; while idle: {waiting}",
        "memory": "unknown" if machine.memory is None else _gib(machine.memory),
    }
    for number, gpu in enumerate(machine.gpus):
        facts[f"GPU {number}"] = (
            f"{gpu.name}, {_gib(gpu.memory)}, capability {gpu.capability}, "
            f"{'usable' if gpu.faiss else 'not usable'} by FAISS"
        )
    return facts if machine.gpus else facts | {"GPU": "none visible to torch"}


def _blas(machine: Machine) -> str:
    match machine.blas_chosen_by:
        case "user":
            return f"{machine.blas or 'empty'}, set by OPENBLAS_CORETYPE"
        case "msf-faiss":
            return f"{machine.blas}, chosen for this processor"
        case _:
            return "unknown, chosen by OpenBLAS"


def _instructions(machine: Machine) -> str:
    if machine.cpu_flags is None:
        return "unknown instruction sets"
    present = [name for name, there in machine.cpu_flags.items() if there]
    absent = [name for name, there in machine.cpu_flags.items() if not there]
    return ", ".join([*present, *([f"no {' or '.join(absent)}"] if absent else [])])


def _timings(search: SearchTiming) -> list[str]:
    """A heading, one line per engine and an empty line; nothing if the search failed."""
    if not search.engine_ms:
        return []
    heading = (
        f"search of {search.rows:,} {search.dtype} entries of {search.dim} dimensions, {search.batch:,} queries, "
        f"k = {search.k}, on {search.device}:"
    )
    chosen = "   chosen by bank.engine=auto"
    times = [
        f"  {engine:<8}{ms:>10,.2f} ms{chosen if engine == search.engine else ''}"
        for engine, ms in search.engine_ms.items()
    ]
    return [heading, *times, ""]


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
