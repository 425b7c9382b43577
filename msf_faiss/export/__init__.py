"""Encoders of a checkpoint in the formats of other libraries, with a model card."""

from msf_faiss.export.encoder import ExportedEncoder, exported_encoder
from msf_faiss.export.folder import export_encoder
from msf_faiss.export.safetensors_file import load_export

__all__ = ["ExportedEncoder", "export_encoder", "exported_encoder", "load_export"]
