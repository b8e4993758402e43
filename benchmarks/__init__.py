"""Measurements against peers and limits; their results are kept as JSON in benchmarks/results."""
