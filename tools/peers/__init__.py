"""The loaders that tools/bench_peers runs side by side: one file each, all of one contract.

`contract.py` says what a peer is and measures it; read it first. `rows.py`, `scgpt.py`, `ranked.py` and
`mixed.py` are what several of them share: cells out of h5ad files, scGPT's collator, Geneformer's ranked
tokens, and which of them a kind of work takes. Every other file is a peer, run as
`python -m peers.NAME JOB` by a Python that has the peer and need not have scshards. So a peer imports
nothing beyond the standard library until a job runs: the front of the tool reads what it says about
itself.
"""

NAMES = (
    "scshards",
    "webdataset",
    "annbatch",
    "scdataset",
    "scdl",
    "soma",
    "scvi",
    "datasets",
    "streaming",
    "litdata",
    "energon",
    "cellload",
)
"""All of them; scshards first."""
