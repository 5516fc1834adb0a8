"""A fine-tuning script in the manner of scGPT's: cells in memory, then the same from a shard set.

    python examples/scgpt_script.py cells.h5ad shards --celltype cell_type --batch donor

The file has counts in X and the two columns in obs; the shard set was packed from it, with both columns
(--obs cell_type,donor) and a valid split. Its parts are the blocks of docs/tutorials/from_scgpt.md.
"""

import argparse
import logging

import anndata
import numpy as np
import torch

from scshards import ShardSet
from scshards.train.compat import (
    TransformerModel,
    evaluate,
    masked_mse_loss,
    prepare_data,
    prepare_dataloader,
    tokenize_and_pad_batch,
    train,
)

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("cells", help="an h5ad file")
parser.add_argument("shards", help="the shard set of its cells")
parser.add_argument("--celltype", default="cell_type")
parser.add_argument("--batch", default="donor")
parser.add_argument("--epochs", type=int, default=3)
args = parser.parse_args()
CELLS, SHARDS, CELLTYPE, BATCH, EPOCHS = vars(args).values()
logging.basicConfig(level=logging.INFO, format="%(message)s")


# %% config
class config:
    task = "annotation"
    GEP = GEPC = CLS = ESC = DAR = DSBN = use_batch_labels = True
    mask_ratio, mask_value, pad_value, pad_token = 0.4, -1, -2, "<pad>"
    max_seq_len, n_bins, include_zero_gene, explicit_zero_prob = 300, 51, False, False
    batch_size, epochs, lr, amp, dab_weight = 32, EPOCHS, 1e-3, False, 1.0
    seed, log_interval = 0, 20


device = "cuda" if torch.cuda.is_available() else "cpu"
logger = logging.getLogger("scgpt")


# %% cells
def binned(row):
    """scGPT's binning of a cell: zeros stay, others become 1 to n_bins - 1 by their quantiles."""
    values = row[row > 0]
    row[row > 0] = np.digitize(values, np.quantile(values, np.linspace(0, 1, config.n_bins - 1)))
    return row


shardset = ShardSet(
    SHARDS
)  # its vocabulary, so that both halves of the script speak of the same tokens
vocab = shardset.vocab
adata = anndata.read_h5ad(CELLS)
adata = adata[:, [gene in vocab for gene in adata.var_names]]
gene_ids = np.array([vocab[gene] for gene in adata.var_names])
x = np.apply_along_axis(binned, 1, adata.to_df().to_numpy(np.float32))
celltypes = adata.obs[CELLTYPE].astype("category").cat
batches = adata.obs[BATCH].astype("category").cat
is_valid = np.random.default_rng(config.seed).random(len(x)) < 0.2
tokenized_train, tokenized_valid = (
    tokenize_and_pad_batch(
        x[which],
        gene_ids,
        max_len=config.max_seq_len,
        vocab=vocab,
        pad_token=config.pad_token,
        pad_value=config.pad_value,
    )
    for which in (~is_valid, is_valid)
)


# %% model
def new_model():
    return TransformerModel(
        len(vocab),
        32,
        2,
        32,
        2,
        n_cls=len(celltypes.categories),
        vocab=vocab,
        dropout=0.0,
        pad_token=config.pad_token,
        pad_value=config.pad_value,
        do_mvc=config.GEPC,
        do_dab=config.DAR,
        use_batch_labels=config.use_batch_labels,
        num_batch_labels=len(batches.categories),
        domain_spec_batchnorm=config.DSBN,
    ).to(device)


model = new_model()
optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
scaler = torch.amp.GradScaler(enabled=config.amp)
criterion_dab = criterion_cls = torch.nn.CrossEntropyLoss()


# %% steps
def one_epoch(epoch, train_loader, valid_loader):
    """The loss of held-out cells after an epoch."""
    train(
        model,
        train_loader,
        vocab,
        masked_mse_loss,
        criterion_dab,
        criterion_cls,
        scaler,
        optimizer,
        scheduler,
        device,
        config,
        logger,
        epoch,
    )
    scheduler.step()
    return evaluate(
        model,
        valid_loader,
        vocab,
        masked_mse_loss,
        criterion_dab,
        criterion_cls,
        device,
        config,
        epoch,
    )


# %% memory
for epoch in range(1, config.epochs + 1):
    train_data, valid_data = prepare_data(
        tokenized_train,
        tokenized_valid,
        batches.codes[~is_valid].to_numpy(),
        batches.codes[is_valid].to_numpy(),
        config,
        epoch,
        celltypes.codes[~is_valid].to_numpy(),
        celltypes.codes[is_valid].to_numpy(),
    )
    loaders = (
        prepare_dataloader(
            train_data,
            config.batch_size,
            intra_domain_shuffle=True,
            per_seq_batch_sample=config.DSBN,
        ),
        prepare_dataloader(valid_data, config.batch_size, per_seq_batch_sample=config.DSBN),
    )
    print(f"in memory, epoch {epoch}: valid loss {one_epoch(epoch, *loaders):.4f}")

# %% stream
loaders = [
    prepare_dataloader(
        SHARDS,
        config.batch_size,
        intra_domain_shuffle=split == "train",
        per_seq_batch_sample=config.DSBN,
        config=config,
        batch_column=BATCH,
        celltype_column=CELLTYPE,
        split=split,
    )
    for split in ("train", "valid")
]
for epoch in range(1, config.epochs + 1):
    print(f"stream, epoch {epoch}: valid loss {one_epoch(epoch, *loaders):.4f}")
