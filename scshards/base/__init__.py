"""Floor 0: errors, seeds, storage, config, progress, locks. Knows nothing of cells.

Read first: errors.py (what a user is told), then storage.py (files and objects behind one face).
"""
