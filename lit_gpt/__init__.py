"""The model and its files: configuration, layers, token files, checkpoints, conversion."""
