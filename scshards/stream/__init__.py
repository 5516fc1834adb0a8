"""Floor 4: shards -> batches. The order is a pure function of (manifest, seed, epoch)."""
