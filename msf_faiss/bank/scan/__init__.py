"""Banks that scan a compressed copy of the ring, and compare the best candidates exactly."""

from msf_faiss.bank.scan.base import ScanBank, ScanLimits
from msf_faiss.bank.scan.bf16 import Bf16ScanBank
from msf_faiss.bank.scan.int8 import Int8ScanBank
from msf_faiss.bank.scan.pq import PqScanBank

SCAN_BANKS: dict[str, type[ScanBank]] = {"bf16": Bf16ScanBank, "int8": Int8ScanBank, "pq": PqScanBank}
"""By the value of `bank.scan`."""

__all__ = ["SCAN_BANKS", "ScanBank", "ScanLimits"]
