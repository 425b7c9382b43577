"""Embeddings of a data set: extracted, written to files, indexed."""
