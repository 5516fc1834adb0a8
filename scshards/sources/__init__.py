"""Floor 4: every kind of input, as gene names, obs columns and rows in CSR blocks.

    inputs -> open -> rows.Source        what a person names -> what is opened -> the contract
    anndata (hdf5, zarr), tenx, mtx, soma, shardset     kinds of sources; matrix has kinds of matrices
    lists (tables, mds, ids)             cells as lists of token ids
    genes, vocabulary                    gene names matched to a vocabulary, and made into one

Read first: rows.py, then open.py.
"""
