"""Embeddings of a data set: compute them, write them to files, index them."""
