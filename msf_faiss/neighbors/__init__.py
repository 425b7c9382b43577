"""Inspect the neighbours that a bank retrieves: as records, a sheet of pictures or an interactive page."""
