"""scGPT's trainer over this package's stream and model: a script moves over by changing its imports.

    prepare_data, prepare_dataloader, train, evaluate      as in scgpt.trainer
    tokenize_and_pad_batch, random_mask_value              as in scgpt.tokenizer
    masked_mse_loss, criterion_neg_log_bernoulli           as in scgpt.loss
    TransformerModel                                       as in scgpt.model

`prepare_dataloader` takes the root of a shard set (or a CellLoader) as well as a dictionary of tensors,
and gives the same dictionaries. docs/compat.md has a script before and after, and what differs. This
module only gathers the names; called by users.
"""

from scshards.train.compat_data import SeqDataset as SeqDataset
from scshards.train.compat_data import prepare_data as prepare_data
from scshards.train.compat_loader import StreamLoader as StreamLoader
from scshards.train.compat_loader import prepare_dataloader as prepare_dataloader
from scshards.train.compat_model import TransformerModel as TransformerModel
from scshards.train.compat_tokens import random_mask_value as random_mask_value
from scshards.train.compat_tokens import tokenize_and_pad_batch as tokenize_and_pad_batch
from scshards.train.compat_train import criterion_neg_log_bernoulli as criterion_neg_log_bernoulli
from scshards.train.compat_train import evaluate as evaluate
from scshards.train.compat_train import masked_mse_loss as masked_mse_loss
from scshards.train.compat_train import train as train

prepare_data_loader = prepare_dataloader
"""Under the name that some scripts use."""
