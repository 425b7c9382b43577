"""Banks: first-in, first-out memories of target embeddings that can be searched."""

from msf_faiss.bank.base import Bank
from msf_faiss.bank.create import create_bank
from msf_faiss.bank.flat import FlatBank
from msf_faiss.bank.ivf.bank import IvfBank
from msf_faiss.bank.reference import ReferenceBank
from msf_faiss.bank.ring import RingSpec

__all__ = ["Bank", "FlatBank", "IvfBank", "ReferenceBank", "RingSpec", "create_bank"]
