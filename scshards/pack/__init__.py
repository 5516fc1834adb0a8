"""Floor 4: AnnData files -> shard sets. Meets stream only in `scshards.shards`."""
