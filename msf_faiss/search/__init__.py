"""Nearest-neighbour search over tensors, with FAISS and with torch."""
