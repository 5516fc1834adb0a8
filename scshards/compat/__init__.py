"""Floor 9: scGPT's trainer over our stream and model: a script moves over by changing its imports.

    prepare_data, prepare_dataloader, train, evaluate      as in scgpt.trainer
    tokenize_and_pad_batch, random_mask_value              as in scgpt.tokenizer
    masked_mse_loss, criterion_neg_log_bernoulli           as in scgpt.loss
    TransformerModel                                       as in scgpt.model

`prepare_dataloader` takes the root of a shard set (or a CellLoader) as well as a dictionary of tensors,
and gives the same dictionaries. docs/tutorials/from_scgpt.md has a script before and after,
docs/explanation/scgpt.md what differs. It is imported as scshards.train.compat too.
Read first: loader.py, then trainer.py.
"""

from scshards.compat.data import SeqDataset, prepare_data
from scshards.compat.loader import StreamLoader, prepare_dataloader
from scshards.compat.model import TransformerModel
from scshards.compat.tokens import random_mask_value, tokenize_and_pad_batch
from scshards.compat.trainer import criterion_neg_log_bernoulli, evaluate, masked_mse_loss, train

prepare_data_loader = prepare_dataloader
"""Under the name that some scripts use."""

__all__ = [
    "SeqDataset",
    "StreamLoader",
    "TransformerModel",
    "criterion_neg_log_bernoulli",
    "evaluate",
    "masked_mse_loss",
    "prepare_data",
    "prepare_data_loader",
    "prepare_dataloader",
    "random_mask_value",
    "tokenize_and_pad_batch",
    "train",
]
