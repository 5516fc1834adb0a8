"""Floor 0: errors, seeds, storage, config, progress. Knows nothing of cells."""
