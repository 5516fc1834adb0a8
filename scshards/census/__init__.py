"""Floor 3: the CELLxGENE Census, and any other SOMA experiment.

    queries -> address                   which cells, of which release, at which address
    index -> partitions                  their soma_joinids, cut into what one task reads
    experiment, context, rows            obs, var and rows of a matrix, in bounded memory
    download, h5ad                       partitions as h5ad files

Read first: queries.py, then experiment.py.
"""
