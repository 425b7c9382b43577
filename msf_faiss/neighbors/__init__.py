"""Inspection of the neighbours that a bank retrieves."""
