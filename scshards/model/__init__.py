"""Floor 5: an scGPT-shaped encoder of cells, its loss, and scGPT's checkpoints. Reads batches only.

    config                         what a model is
    transformer                    the model: embeddings, encoder, attention, norm, heads -> output
    layout                         where tokens of padded, packed and two-part batches are
    adapters                       low-rank ones, for fine-tuning
    loss                           losses of values, classes, similarity
    scgpt, scgpt_args, scgpt_files, weights, classes   checkpoint folders

Read first: config.py, then transformer.py.
"""
