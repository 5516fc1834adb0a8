"""Floor 6: what a model is trained for: heads, losses, labels.

    settings             the table [task] of a config
    base                 Task: a model with its losses, as sums and counts of named terms
    pretrain, finetune   values that are hidden; domains made alike, classes
    labels, confusion    label columns; cells by true and by predicted class
    make                 the task that the settings ask for

Read first: base.py.
"""
