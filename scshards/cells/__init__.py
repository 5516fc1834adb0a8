"""Floor 1: what a cell is: vocabulary, tokens, and the batch that stream and model share.

Read first: vocab.py, then tokenizer.py.
"""
