"""Cells of lanes through shuffle buffers into blocks of batches. Read store.py first, then blocks.py."""
