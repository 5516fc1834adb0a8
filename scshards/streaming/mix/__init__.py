"""Lanes of cells through shuffle buffers into blocks of batches. Read lanes.py first, then blocks.py."""
