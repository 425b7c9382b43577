"""Data sources and the batches made of them."""
