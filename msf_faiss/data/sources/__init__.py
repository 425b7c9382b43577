"""Data sets of images in different formats."""
