import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from invoking import Cli
from msf_faiss_cli import main as entry
from msf_faiss_cli.doctor import command

from msf_faiss import doctor as diagnosis
from msf_faiss.doctor import Gpu, Problem
from msf_faiss.search import autotune as choice

SMALL = ["--rows", "300", "--dim", "16", "--batch", "8"]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(command, [*SMALL, *arguments], catch_exceptions=False)


def fake_machine(monkeypatch: pytest.MonkeyPatch, problems: tuple[Problem, ...] = (), **changes: object) -> None:
    """Change facts about this machine, and give it exactly these problems."""
    machine = dataclasses.replace(diagnosis.inspect_machine(), **changes)
    monkeypatch.setattr(diagnosis, "inspect_machine", lambda: machine)
    monkeypatch.setattr(diagnosis, "find_problems", lambda machine, search: problems)


def test_doctor_prints_versions_and_timings() -> None:
    result = invoke("--dtype", "bfloat16", "-k", "3")
    assert result.exit_code == 0
    machine = diagnosis.inspect_machine()
    for version in machine.versions.values():
        assert version in result.stdout
    assert f"cores      {machine.cores} available" in result.stdout
    assert "threads    torch 1, FAISS 1; while idle: " in result.stdout
    assert "300 bfloat16 entries of 16 dimensions, 8 queries, k = 3" in result.stdout
    lines = [line for line in result.stdout.splitlines() if " ms" in line]
    assert {line.split()[0] for line in lines} >= {"faiss", "torch"}
    assert lines[0].endswith("chosen by bank.engine=auto")
    assert "auto" not in lines[1]


def test_json_has_the_same_content() -> None:
    result = invoke("--json")
    assert result.exit_code == 0
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["machine"] == json.loads(json.dumps(dataclasses.asdict(diagnosis.inspect_machine())))
    assert found["search"]["engine"] in found["search"]["engine_ms"]
    assert {tuple(problem) for problem in found["problems"]} <= {("what", "remedy")}


def test_doctor_says_if_there_are_no_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(monkeypatch)
    assert invoke().stdout.splitlines()[-1] == "no problems found"


def test_problems_are_printed_last_with_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_machine(
        monkeypatch, (Problem(what="it [rains]", remedy="an umbrella"), Problem(what="it pours", remedy="a roof"))
    )
    result = invoke()
    assert result.exit_code == 0
    assert result.stdout.endswith(
        "\n\nproblem: it [rains]\n  remedy: an umbrella\nproblem: it pours\n  remedy: a roof\n"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"gpus": ()}, "GPU        none visible to torch"),
        (
            {
                "gpus": (
                    Gpu(name="NVIDIA H100", memory=80 << 30, capability="9.0", faiss=True),
                    Gpu(name="NVIDIA L4", memory=24 << 30, capability="8.9", faiss=False),
                )
            },
            "GPU 0      NVIDIA H100, 80.0 GiB, capability 9.0, usable by FAISS\n"
            "GPU 1      NVIDIA L4, 24.0 GiB, capability 8.9, not usable by FAISS",
        ),
        ({"cpu": None, "cpu_flags": None}, "processor  unknown model, unknown instruction sets"),
        (
            {"cpu": "EPYC", "cpu_flags": {"avx2": True, "avx512f": True, "amx": False}},
            "processor  EPYC, avx2, avx512f, no amx",
        ),
        ({"memory": None}, "memory     unknown"),
        ({"cores": 2, "cpu_quota": 1.5}, "cores      2 available, by a CPU quota of 1.5"),
        (
            {"torch_threads": 2, "waiting": {"GOMP_SPINCOUNT": "20000", "OPENBLAS_THREAD_TIMEOUT": "14"}},
            "threads    torch 2, FAISS 1; while idle: GOMP_SPINCOUNT=20000, OPENBLAS_THREAD_TIMEOUT=14",
        ),
        ({"waiting": {}}, "threads    torch 1, FAISS 1; while idle: they spin"),
        ({"blas": "Zen", "blas_chosen_by": "user"}, "BLAS       Zen, set by OPENBLAS_CORETYPE"),
        ({"blas": "SkylakeX", "blas_chosen_by": "msf-faiss"}, "BLAS       SkylakeX, chosen for this processor"),
        ({"blas": None, "blas_chosen_by": "OpenBLAS"}, "BLAS       unknown, chosen by OpenBLAS"),
        ({"faiss_wheels": ("faiss-cpu",), "faiss_cuda": False}, " from faiss-cpu, without CUDA"),
        ({"faiss_wheels": (), "faiss_cuda": True}, " from no package, with CUDA"),
    ],
)
def test_doctor_prints_any_machine(monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], line: str) -> None:
    fake_machine(monkeypatch, **changes)
    assert f"{line}\n" in invoke().stdout


def test_failed_search_leaves_the_rest_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> dict[str, float]:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(diagnosis, "time_engines", fail)
    result = invoke()
    assert result.exit_code == 0
    assert "memory" in result.stdout
    assert not re.search(r"\d ms\b", result.stdout)
    assert "failed: no kernel image is available\n  remedy: " in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--dim", "0"], "'--dim': 0 is not in the range"),
        (["--batch", "0"], "'--batch': 0 is not in the range"),
        (["-k", "0"], "'--k' / '-k': 0 is not in the range"),
        (["--rows", "65537"], "'--rows': 65537 is not in the range"),
        (["--rows", "4"], "'--k': 5 neighbours, but only 4 entries (--rows)"),
        (["--dtype", "int8"], "'--dtype': 'int8' is not one of"),
    ],
)
def test_invalid_options_are_usage_errors(arguments: list[str], complaint: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stdout == ""


def test_rows_option_allows_what_is_timed() -> None:
    (rows,) = [option for option in command.params if option.name == "rows"]
    assert rows.type.max == choice._CPU_ROWS


def test_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in ("msf_faiss.doctor", "msf_faiss.search.faiss_setup"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(sys, "argv", ["msf-faiss", "doctor"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "faiss" in captured.err
    assert "Traceback" not in captured.err


def test_doctor_in_a_process_of_its_own(msf_faiss: Cli, tmp_path: Path) -> None:
    done = msf_faiss("doctor", *SMALL, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert set(json.loads(done.stdout)) == {"machine", "search", "problems"}
    assert list(tmp_path.iterdir()) == []
