"""The training program: a run is a list of stages, and growth happens between two of them."""
