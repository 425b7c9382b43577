"""Importing FAISS, also without FAISS or a GPU; each test in a process of its own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**{k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_leaves_the_environment_unchanged() -> None:
    code = """
        import os
        from msf_faiss.search.faiss_setup import faiss
        print(os.environ.get("OPENBLAS_CORETYPE"), faiss.cvar.distance_compute_blas_threshold)
    """
    assert run_python(code) == "None 0"
    assert run_python(code, OPENBLAS_CORETYPE="Haswell") == "Haswell 0"


BLOCKED = """
    import sys
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name == "faiss":
                raise ModuleNotFoundError("No module named 'faiss'", name="faiss")
    sys.meta_path.insert(0, Blocker())
"""


def test_missing_faiss_raises_user_error_with_install_command() -> None:
    message = "FAISS cannot be imported (No module named 'faiss'). Reinstall it: pip install --force-reinstall faiss-"
    code = """
        import os
        from msf_faiss.errors import UserError
        try:
            import msf_faiss.bank
        except UserError as error:
            print(error, "|", os.environ.get("OPENBLAS_CORETYPE"))
    """
    out = run_python(textwrap.dedent(BLOCKED) + textwrap.dedent(code))
    assert out.startswith(message)
    assert out.endswith(" | None")


def test_commands_without_faiss(tmp_path: Path) -> None:
    code = """
        from msf_faiss_cli.main import main
        sys.argv = ["msf-faiss", *{arguments}]
        main()
    """
    for arguments, status in ((["pretrain", "--out", str(tmp_path / "run")], 2), (["config-schema"], 0)):
        command = textwrap.dedent(BLOCKED) + textwrap.dedent(code.format(arguments=arguments))
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert (status == 2) == done.stderr.startswith("error: FAISS cannot be imported")
    assert not (tmp_path / "run").exists()


def test_faiss_without_cuda_on_a_machine_with_gpu() -> None:
    code = """
        import faiss
        if hasattr(faiss, "StandardGpuResources"):
            del faiss.StandardGpuResources
        faiss.get_num_gpus = lambda: 1  # pretends that there is a GPU
        import torch
        from msf_faiss.bank import FlatBank, RingSpec
        from msf_faiss.search.autotune import engines
        from msf_faiss.search.faiss_setup import has_gpu
        bank = FlatBank(RingSpec(8, 4))
        bank.push(torch.eye(4), torch.arange(4))
        print(has_gpu(), bank.search(torch.eye(4), 1).slots.flatten().tolist(), *engines(torch.device("cuda")))
    """
    assert run_python(code, CUDA_VISIBLE_DEVICES="") == "False [0, 1, 2, 3] torch"


def test_faiss_with_cuda_on_a_machine_without_gpu() -> None:
    """`knn_gpu` would abort the process."""
    code = """
        import torch
        from msf_faiss.bank import FlatBank, RingSpec, create_bank
        from msf_faiss.search.autotune import engines
        from msf_faiss.search.faiss_engines import default_engine
        from msf_faiss.search.faiss_setup import has_gpu
        from msf_faiss.config import FlatBankConfig
        bank = FlatBank(RingSpec(8, 4))
        bank.push(torch.eye(4), torch.arange(4))
        timed = create_bank(FlatBankConfig(capacity=8, k=2), dim=4, device=torch.device("cpu"), batch=4)
        print(has_gpu(), bank.search(torch.eye(4), 1).slots.flatten().tolist(), *sorted(timed.engine_ms))
        print(*engines(torch.device("cuda")), default_engine(torch.device("cuda")).name)
    """
    assert run_python(code, CUDA_VISIBLE_DEVICES="") == "False [0, 1, 2, 3] faiss torch\ntorch torch"
