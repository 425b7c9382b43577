"""Banks: FIFO memories of target embeddings that can be searched."""

from msf_faiss.bank.base import ApproximateBank, Bank
from msf_faiss.bank.create import create_bank
from msf_faiss.bank.flat import FlatBank
from msf_faiss.bank.ivf.bank import IvfBank
from msf_faiss.bank.parallel import ParallelBank, ReplicatedBank, ShardedBank
from msf_faiss.bank.reference import ReferenceBank

__all__ = [
    "ApproximateBank",
    "Bank",
    "FlatBank",
    "IvfBank",
    "ParallelBank",
    "ReferenceBank",
    "ReplicatedBank",
    "ShardedBank",
    "create_bank",
]
