"""Blocks of cells -> batches of tensors. Read first: options.py, then batches.py."""
