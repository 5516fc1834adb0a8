"""Which cell comes when: choose, weights -> strata -> plan -> state. Integers only; no cell is read.

Read first: plan.py.
"""
