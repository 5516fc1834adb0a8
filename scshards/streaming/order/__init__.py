"""Which cell comes when: choose -> strata -> plan -> state. Integers only; no cell is read.

Read first: plan.py.
"""
