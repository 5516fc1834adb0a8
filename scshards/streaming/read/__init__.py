"""Bytes of chunks and indexes, read, kept on the node, checked. Read source.py first, then fetch.py."""
