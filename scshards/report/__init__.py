"""Floor 9: what a person looks at: how well batches mix, how fast they come, how a run went,
what a machine has (doctor.py); a set and its runs as one page of HTML (page/).

Read first: mixing.py; of runs, plot.py.
"""
