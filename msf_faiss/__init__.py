"""Mean-shift pretraining of image encoders with a FAISS memory bank."""

__version__ = "0.1.0"
