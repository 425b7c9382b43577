"""Scores of frozen encoders."""
