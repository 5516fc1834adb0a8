"""Floor 7: what a person looks at: how well batches mix, how fast they come.

Read first: mixing.py.
"""
