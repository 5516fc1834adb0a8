"""Floor 5: a shard set -> scBank, AnnData or parquet, as a stream.

    export -> cells -> order             which cells, in which order
    h5ad, parquet, values                one file of each kind, and the numbers in it
    output                               nothing is seen there before it is whole
    card                                 a README.md by which Hugging Face reads the set where it is

Read first: export.py.
"""
