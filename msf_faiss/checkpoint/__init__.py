"""Checkpoints: their format on disk, how they are saved, and how models and banks are loaded from them."""
