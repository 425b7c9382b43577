"""Distributed training: the ranks of a run, and batch norm across them."""
