"""Floor 1: what a cell is: vocabulary, values, tokens, and the batch that stream and model share."""
