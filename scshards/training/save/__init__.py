"""What a run leaves on disk, and how it goes on from there.

    folder       RUN: what lies in it, who may go on
    checkpoint   step-00000020/: tensors and state, written while the run goes on
    store        how torch writes and reads the tensors
    branch       a run that goes on from another's checkpoint
    recorded     states and configs of other versions

Read first: folder.py, then checkpoint.py.
"""
