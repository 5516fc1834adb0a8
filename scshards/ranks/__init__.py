"""Floor 5: which processes compute, on which device and how precisely, and what they tell each other.

    launch   who this process is, as torchrun's environment says
    ranks    the group, its device and precision, sums over all
    watch    what becomes of all when one fails

Read first: ranks.py.
"""
