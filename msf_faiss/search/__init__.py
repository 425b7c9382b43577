"""Nearest-neighbour search over tensors, by FAISS and by torch; no FIFO, no training."""
