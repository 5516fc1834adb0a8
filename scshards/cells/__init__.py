"""Floor 1: what a cell is: vocabulary, tokens, groups, and the batch that stream and model share.

Read first: vocab.py, then tokenizer.py; of groups and holdouts, group_options.py.
"""
