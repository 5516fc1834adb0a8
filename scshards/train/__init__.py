"""Floor 5: masked-value training on the stream of cells, alone or under torchrun."""
