"""A run's report: one HTML page of its curves, config, evaluations and neighbours, beside those of other runs."""
