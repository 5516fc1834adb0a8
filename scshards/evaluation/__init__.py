"""Floor 7: how good a model is, on held-out cells, and beside it what needs no model.

    score                     the task's losses over a split
    baselines                 means that a model has to beat
    embeddings, integration   vectors of cells, and how well they keep classes and mix domains
    probes                    how much of a label they tell
    verdict                   all of it in words and tables

Read first: score.py.
"""
