"""Ranks that train together."""
