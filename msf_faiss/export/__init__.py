"""Export of encoders to the formats of other libraries, with a model card."""

from msf_faiss.export.folder import export_encoder
from msf_faiss.export.safetensors_file import load_export

__all__ = ["export_encoder", "load_export"]
