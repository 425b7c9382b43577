"""A run as others see it: its directory, its events, its records and its status."""
