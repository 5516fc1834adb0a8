"""Floor 9: a trained model on cells: embeddings, classes, its verdict.

    options          how it is applied
    cells            an input or a shard set as batches
    apply            cells -> rows of each rank -> one h5ad file (output)
    embed, annotate  what the rows are
    evaluate         a run's model on a split
    publish          a run's model as a folder to hand on
    replay           the cells of one of its steps

Read first: apply.py, then embed.py.
"""
