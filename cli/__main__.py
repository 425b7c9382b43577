"""`python -m msf_faiss_cli` and `torchrun -m msf_faiss_cli`."""

from .main import main

main()
