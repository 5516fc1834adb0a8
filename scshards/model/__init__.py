"""Floor 4: an scGPT-shaped encoder of cells, its loss, and scGPT's checkpoints. Reads batches only."""
