"""Floor 5: a shard set's cells as batches, in an order that is exact at any scale.

    order/     (manifest, seed, epoch, topology) -> which cell, in which order: integers only
    read/      chunks and indexes, fetched, cached and checked
    mix/       lanes, shuffle buffers, blocks of cells in batch order
    sets/      sets of cells of one group beside controls: their own way from labels to blocks
    collate/   blocks -> batches: options, padding, packing, what is finished on the device
    options                     which class each option of a loader is a field of
    loader, dataset, wds        the faces; quarantine: what stays bad
    variable, medians           what one stream says of each gene

Read first: loader.py, then order/plan.py.
"""
