"""Is a shard set what its manifest says, to the last byte?

    whole      `verify`: all shards, and what can only be known over all of them
    shard      one shard against its manifest entry, its index and format 1
    promises   what the options of the set promise of its cells, and whether they can be true
    holdout    what a holdout of a loader holds out of the set, and whether its groups have controls
    repair     damaged shards made again: the same bytes, or none

Read first: whole.py.
"""
