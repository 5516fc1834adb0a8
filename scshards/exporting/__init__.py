"""Floor 5: a shard set -> scBank, AnnData or parquet, as a stream.

    export -> cells      which cells, in parts; and their values, columns and keys
    h5ad, parquet        one file of each kind
    output               nothing is seen there before it is whole
    card                 a README.md by which Hugging Face reads the set where it is

Read first: export.py.
"""
