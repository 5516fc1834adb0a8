"""Embedding cells: the model's own output, the same bytes however it is computed; faults refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import anndata
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from plain_bins import bin_values
from rank_host import RankTeam
from scipy.io import mmwrite
from scipy.sparse import coo_matrix, csc_matrix, csr_matrix

from scshards.applying.apply import shares
from scshards.applying.cells import regrouped
from scshards.applying.embed import EmbedOptions, embed
from scshards.base.errors import CheckpointError, ConfigError, OutputExistsError, SourceError
from scshards.base.locks import LOCK, locked
from scshards.cells.batch import Batch
from scshards.cells.vocab import Vocab
from scshards.cli.embed import command
from scshards.model.classes import DOMAINS, write_names
from scshards.model.config import ModelConfig
from scshards.model.scgpt import load_model, write_folder
from scshards.model.transformer import CellModel
from scshards.packing.options import PackOptions
from scshards.packing.pack import pack

GENES = [f"G{i}" for i in range(60)]
VOCAB = Vocab.from_genes(GENES[5:] + ["OTHER"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        n_tokens=len(VOCAB),
        pad_id=VOCAB.pad_id,
        d_model=16,
        n_heads=2,
        d_hid=24,
        n_layers=2,
        max_length=40,
    )
    write_folder(str(folder), CellModel(config, seed=1), VOCAB.to_dict())
    return str(folder)


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.poisson(0.6, (70, 60)).astype(np.float32)
    x[7, 5:] = 0  # a cell without a gene of the vocabulary
    return x


def write(path: Path, x: object, **parts: object) -> Path:
    cells = anndata.AnnData(x, **parts)
    cells.var_names = GENES
    cells.obs["donor"] = [f"d{i % 3}" for i in range(cells.n_obs)]
    cells.write_h5ad(path)
    return path


def plain(
    checkpoint: str, x: np.ndarray, domains: torch.Tensor | None = None, *, zeros: bool = False
) -> np.ndarray:
    """One cell at a time, written out: only for cells no longer than max_length.

    With `zeros`, every gene of the vocabulary that a cell does not express is there too, as 0.
    """
    model = load_model(checkpoint).model.eval()
    out = []
    for i, row in enumerate(x):
        tokens = sorted((VOCAB[g], v) for g, v in zip(GENES, row, strict=True) if v and g in VOCAB)
        genes = [VOCAB.cls_id] + [t for t, _ in tokens]
        values = [-2.0] + bin_values(np.array([v for _, v in tokens]), 51).tolist()
        if zeros:
            more = sorted({VOCAB[g] for g in (*GENES[5:], "OTHER")} - set(genes))
            genes, values = genes + more, values + [0.0] * len(more)
        with torch.no_grad():
            values_BL = torch.tensor([values])
            nowhere_BL = torch.zeros(1, len(genes), dtype=torch.bool)
            v = model(
                Batch(
                    genes=torch.tensor([genes]),
                    values=values_BL,
                    targets=values_BL,
                    is_masked=nowhere_BL,
                    is_pad=nowhere_BL,
                    key=torch.zeros(1, dtype=torch.int64),
                    labels={},
                    weight=torch.ones(1),
                ),
                domains_B=None if domains is None else domains[i : i + 1],
            )
        out.append((v.cell_embeddings / v.cell_embeddings.norm())[0].numpy())
    return np.array(out)


@pytest.mark.parametrize("form", [csr_matrix, csc_matrix, np.asarray])
def test_embeddings_are_the_models_own(
    tmp_path: Path, checkpoint: str, counts: np.ndarray, form: type
) -> None:
    source = write(tmp_path / "in.h5ad", form(counts))
    report = embed(checkpoint, str(source), tmp_path / "out.h5ad", shown=False)
    result = anndata.read_h5ad(tmp_path / "out.h5ad")
    vectors = result.obsm["X_scshards"]
    assert vectors.dtype == np.float32 and vectors.shape == (70, 16)
    assert np.abs(vectors - plain(checkpoint, counts)).max() < 1e-5
    (file,) = report.files
    assert (file.cells, file.matched, file.columns, file.empty_cells) == (70, 55, 60, 1)
    # Everything else of the file is as it was.
    x = result.X.toarray() if hasattr(result.X, "toarray") else result.X
    assert np.array_equal(x, counts) and result.obs["donor"].tolist() == [
        f"d{i % 3}" for i in range(70)
    ]


def vectors(path: Path) -> np.ndarray:
    found: np.ndarray = anndata.read_h5ad(path).obsm["X_scshards"]
    return found


def test_the_bytes_do_not_depend_on_batches_and_threads_and_long_cells_are_sampled_by_seed(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = str(write(tmp_path / "in.h5ad", csr_matrix(counts)))

    def embedded(name: str, **options: object) -> Path:
        options = EmbedOptions(max_length=10, **options)
        embed(checkpoint, source, tmp_path / name, options, shown=False)
        return tmp_path / name

    one = embedded("a.h5ad", batch_size=7, threads=1)
    assert one.read_bytes() == embedded("b.h5ad", batch_size=64, threads=3).read_bytes()
    assert np.abs(vectors(one) - vectors(embedded("c.h5ad", seed=1))).max() > 1e-3


def embedded_by_command(*words: str) -> tuple[int, str]:
    """Exit code and standard output of `scshards embed`: a job for ranks of rank_host.py."""
    done = CliRunner().invoke(command, words)
    return done.exit_code, done.stdout


def test_two_ranks_write_what_one_writes(
    tmp_path: Path, checkpoint: str, counts: np.ndarray, two_ranks: RankTeam
) -> None:
    # By columns: the matrix is written out by rows first, once for both ranks.
    source = write(tmp_path / "in.h5ad", csc_matrix(counts))
    embed(checkpoint, str(source), tmp_path / "one.h5ad", EmbedOptions(threads=2), shown=False)
    words = (checkpoint, str(source), "-o", str(tmp_path / "two.h5ad"))
    said = two_ranks.run(f"{__name__}:embedded_by_command", *words)
    assert [code for code, _ in said] == [0, 0]
    assert ["70 cells as 16 numbers" in out for _, out in said] == [True, False]
    assert (tmp_path / "two.h5ad").read_bytes() == (tmp_path / "one.h5ad").read_bytes()
    assert len(list(tmp_path.iterdir())) == 3


def test_zarr_mtx_and_shards_give_what_the_h5ad_file_gives(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = write(tmp_path / "in.h5ad", csr_matrix(counts))
    embed(checkpoint, str(source), tmp_path / "a.h5ad", shown=False)
    cells = anndata.read_h5ad(source)
    cells.write_zarr(tmp_path / "in.zarr")
    mtx = tmp_path / "mtx"
    mtx.mkdir()
    mmwrite(mtx / "matrix.mtx", coo_matrix(counts.T.astype(int)))
    (mtx / "barcodes.tsv").write_text("".join(f"{i}\n" for i in range(70)))
    (mtx / "genes.tsv").write_text("".join(f"E{g}\t{g}\n" for g in GENES))
    options = PackOptions(obs=("donor",), valid_fraction=0.3, cells_per_shard=16, workers=1)
    shards = str(tmp_path / "shards")
    pack(str(source), shards, VOCAB, options, progress=False)

    bank = tmp_path / "bank.scb"
    bank.mkdir()
    (bank / "manifest.json").write_text('{"on_disk_format": "parquet", "main_data": "counts"}')
    (bank / "gene_vocab.json").write_text(json.dumps({g: i for i, g in enumerate(GENES)}))
    lists = {"id": range(70), "genes": [np.flatnonzero(row) for row in counts]}
    lists["expressions"] = [row[row > 0] for row in counts]
    pq.write_table(pa.table(lists), bank / "counts.datatable.parquet")

    several = [str(tmp_path / "in.zarr"), str(mtx), str(bank), shards]
    report = embed(checkpoint, several, tmp_path / "out", shown=False)
    assert [Path(f.output).name for f in report.files] == [
        "in.h5ad", "mtx.h5ad", "bank.h5ad", "shards.h5ad"
    ]  # fmt: skip
    expected = vectors(tmp_path / "a.h5ad")
    zarr, tenx, lists_of, packed = (anndata.read_h5ad(f.output) for f in report.files)
    assert lists_of.obs["id"].tolist() == list(range(70))
    for result in (zarr, tenx, lists_of):
        assert np.array_equal(result.obsm["X_scshards"], expected)
        assert result.X is None and result.obs_names.tolist() == cells.obs_names.tolist()
    assert zarr.obs["donor"].tolist() == cells.obs["donor"].tolist()
    # Of the shards every packed cell, split by split, by its row in the source.
    rows = packed.obs["row"].to_numpy()
    assert sorted(rows) == [i for i in range(70) if i != 7]  # a cell without genes is not packed
    assert np.array_equal(packed.obsm["X_scshards"], expected[rows])
    assert packed.obs["donor"].tolist() == cells.obs["donor"].iloc[rows].tolist()
    assert packed.obs_names[0] == f"000000-{rows[0]:010d}"
    assert packed.obs["split"].tolist() == sorted(packed.obs["split"], key=["train", "valid"].index)

    embed(checkpoint, shards, tmp_path / "v.h5ad", EmbedOptions(split="valid"), shown=False)
    valid = anndata.read_h5ad(tmp_path / "v.h5ad")
    held_out = packed[packed.obs["split"] == "valid"]
    assert 0 < valid.n_obs < 69 and valid.obs_names.tolist() == held_out.obs_names.tolist()
    assert np.array_equal(valid.obsm["X_scshards"], held_out.obsm["X_scshards"])


def test_shards_of_another_vocabulary_are_renumbered_or_refused(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = write(tmp_path / "in.h5ad", csr_matrix(counts))
    embed(checkpoint, str(source), tmp_path / "a.h5ad", shown=False)
    options = PackOptions(workers=1)
    fewer = Vocab(GENES[:4:-1]).with_specials()
    pack(str(source), str(tmp_path / "fewer"), fewer, options, progress=False)
    embed(checkpoint, str(tmp_path / "fewer"), tmp_path / "b.h5ad", shown=False)
    b = anndata.read_h5ad(tmp_path / "b.h5ad")
    expected = vectors(tmp_path / "a.h5ad")[b.obs["row"].to_numpy()]
    assert np.abs(b.obsm["X_scshards"] - expected).max() < 1e-5
    more = Vocab.from_genes([*GENES, "OTHER"])
    pack(str(source), str(tmp_path / "more"), more, options, progress=False)
    with pytest.raises(CheckpointError, match="5 of the 64 tokens"):
        embed(checkpoint, str(tmp_path / "more"), tmp_path / "c.h5ad", shown=False)


def test_ranks_share_units_and_members_are_regrouped_as_they_come() -> None:
    for unit in (1, 4):
        for world in (1, 2, 3, 50):
            parts = (10, 0, 7)
            mine = [shares(parts, unit, rank, world) for rank in range(world)]
            cells = [(p, i) for share in mine for p, a, b in share for i in range(a, b)]
            assert cells == [(p, i) for p, n in enumerate(parts) for i in range(n)]
            assert all(a % unit == 0 for share in mine for _, a, _ in share)

    taken = 0

    def members() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        nonlocal taken
        for i in range(6):
            taken += 1
            yield np.full(10, i, np.uint8), np.array([1, 4, 5])

    groups = regrouped(members(), 4)
    data, sizes = next(groups)
    assert taken == 2, "no more is read than what is asked for needs"
    assert sizes.tolist() == [1, 4, 5, 1] and data.tolist() == [0] * 10 + [1]
    rest = list(groups)
    assert [len(s) for _, s in rest] == [4, 4, 4, 2]
    assert np.concatenate([d for d, _ in rest]).tolist() == [1] * 9 + [i for i in range(2, 6) for _ in range(10)]  # fmt: skip


def test_a_model_that_normalises_by_domain_is_told_each_cells_domain(
    tmp_path: Path, counts: np.ndarray
) -> None:
    (folder := tmp_path / "model").mkdir()
    config = ModelConfig(
        n_tokens=len(VOCAB), pad_id=VOCAB.pad_id, d_model=16, n_heads=2, d_hid=24, n_layers=1,
        max_length=60, n_domains=3, domain_norm=True,
    )  # fmt: skip
    model = CellModel(config, seed=1).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "running" in name:
                tensor.add_(torch.rand(16, generator=torch.Generator().manual_seed(len(name))))
        model.dsbn.running_mean[1].mul_(3)
    write_folder(str(folder), model, VOCAB.to_dict())
    source = write(tmp_path / "in.h5ad", csr_matrix(counts))
    with pytest.raises(CheckpointError, match=r"lacks domains\.json"):
        embed(str(folder), str(source), tmp_path / "o.h5ad", shown=False)
    write_names(folder, DOMAINS, "batch", ["d2", "d0"])
    with pytest.raises(CheckpointError, match="names 2 domains, and the model has 3"):
        embed(str(folder), str(source), tmp_path / "o.h5ad", shown=False)
    write_names(folder, DOMAINS, "batch", ["d2", "d0", "d1"])
    with pytest.raises(SourceError, match="no column 'batch'"):
        embed(str(folder), str(source), tmp_path / "o.h5ad", shown=False)
    options = EmbedOptions(domain_column="donor")
    embed(str(folder), str(source), tmp_path / "a.h5ad", options, shown=False)
    code = torch.tensor([{"d2": 0, "d0": 1, "d1": 2}[f"d{i % 3}"] for i in range(70)])
    own = plain(str(folder), counts, domains=code)
    assert np.abs(vectors(tmp_path / "a.h5ad") - own).max() < 1e-5
    assert np.abs(own - plain(str(folder), counts, domains=code.roll(1))).max() > 1e-2

    packing = PackOptions(obs=("donor",), workers=1)
    pack(str(source), str(tmp_path / "shards"), VOCAB, packing, progress=False)
    embed(str(folder), str(tmp_path / "shards"), tmp_path / "b.h5ad", options, shown=False)
    packed = anndata.read_h5ad(tmp_path / "b.h5ad")
    rows = packed.obs["row"].to_numpy()
    assert np.array_equal(packed.obsm["X_scshards"], vectors(tmp_path / "a.h5ad")[rows])
    write_names(folder, DOMAINS, "donor", ["d2", "other", "d1"])
    for cells in (source, tmp_path / "shards"):
        with pytest.raises(SourceError, match="the domain 'd0' can't be embedded"):
            embed(str(folder), str(cells), tmp_path / "o.h5ad", shown=False)


def test_ties_are_broken_as_in_training(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = str(write(tmp_path / "in.h5ad", csr_matrix(counts)))
    made = {}
    for rule in ("high", "random"):
        (folder := tmp_path / rule).mkdir()
        extra = {"scshards": {"config": {"data": {"tie_break": rule}}}}
        write_folder(str(folder), load_model(checkpoint).model, VOCAB.to_dict(), extra)
        embed(str(folder), source, tmp_path / f"{rule}.h5ad", shown=False)
        made[rule] = vectors(tmp_path / f"{rule}.h5ad")
    assert np.abs(made["high"] - plain(checkpoint, counts)).max() < 1e-5
    assert np.abs(made["high"] - made["random"]).max() > 1e-3


def test_unexpressed_genes_are_shown_as_in_training(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = str(write(tmp_path / "in.h5ad", csr_matrix(counts)))
    (folder := tmp_path / "model").mkdir()
    extra = {"scshards": {"config": {"data": {"include_zero_genes": 56}}}}
    write_folder(str(folder), load_model(checkpoint).model, VOCAB.to_dict(), extra)
    whole = EmbedOptions(max_length=112)
    embed(str(folder), source, tmp_path / "out.h5ad", whole, shown=False)
    found = vectors(tmp_path / "out.h5ad")
    assert np.abs(found - plain(checkpoint, counts, zeros=True)).max() < 1e-5
    assert np.abs(found - plain(checkpoint, counts)).max() > 1e-3
    # A shard set of the same cells and vocabulary shows the same ones, also where some are drawn.
    (few := tmp_path / "few").mkdir()
    extra = {"scshards": {"config": {"data": {"include_zero_genes": 5}}}}
    write_folder(str(few), load_model(checkpoint).model, VOCAB.to_dict(), extra)
    options = PackOptions(cells_per_shard=16, workers=1)
    pack(source, str(tmp_path / "shards"), VOCAB, options, progress=False)
    of = [source, str(tmp_path / "shards")]
    embed(str(few), of, tmp_path / "both", shown=False)
    rows = anndata.read_h5ad(tmp_path / "both" / "shards.h5ad").obs["row"].to_numpy()
    packed, plainly = (vectors(tmp_path / "both" / f"{n}.h5ad") for n in ("shards", "in"))
    assert np.array_equal(packed, plainly[rows])
    short = EmbedOptions(max_length=57)
    with pytest.raises(ConfigError, match="56 for unexpressed"):
        embed(str(folder), source, tmp_path / "no.h5ad", short, shown=False)


@pytest.mark.gpu
def test_cuda_gives_the_same_bytes_for_any_batch_size_and_nearly_what_the_cpu_gives(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = str(write(tmp_path / "in.h5ad", csr_matrix(counts)))

    def embedded(name: str, **options: object) -> Path:
        options = EmbedOptions(precision="fp32", **options)
        embed(checkpoint, source, tmp_path / name, options, shown=False)
        return tmp_path / name

    one = embedded("a.h5ad", device="cuda", batch_size=7)
    assert one.read_bytes() == embedded("b.h5ad", device="cuda", batch_size=64).read_bytes()
    assert np.abs(vectors(one) - vectors(embedded("c.h5ad", device="cpu"))).max() < 1e-3


def test_fractions_are_binned_like_counts_of_the_same_order(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = write(
        tmp_path / "in.h5ad", csr_matrix(np.log1p(counts)), layers={"counts": csr_matrix(counts)}
    )
    embed(checkpoint, str(source), tmp_path / "a.h5ad", shown=False)
    embed(checkpoint, str(source), tmp_path / "b.h5ad", EmbedOptions(layer="counts"), shown=False)
    a, b = (anndata.read_h5ad(tmp_path / f"{n}.h5ad").obsm["X_scshards"] for n in "ab")
    assert np.abs(a - b).max() < 1e-5


def test_genes_are_matched_as_pack_matches_them(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    """By the column of var that fits best; one input's own choice; ids with their versions."""
    symbols = write(tmp_path / "symbols.h5ad", csr_matrix(counts))
    ids = [f"ENSG{i:011d}" for i in range(len(GENES))]
    cells = anndata.read_h5ad(symbols)
    cells.var["called"] = list(cells.var_names)
    cells.var_names = [f"{name}.3" for name in ids]
    cells.write_h5ad(tmp_path / "one.h5ad")
    cells.var["other"] = [*cells.var["called"][1:], cells.var["called"].iloc[0]]
    cells.write_h5ad(tmp_path / "two.h5ad")
    by_ids = tmp_path / "by_ids"
    by_ids.mkdir()
    id_of = dict(zip(GENES, ids, strict=True))
    vocab = {id_of.get(token, token): i for token, i in VOCAB.to_dict().items()}
    write_folder(str(by_ids), load_model(checkpoint).model, vocab)
    wanted = plain(checkpoint, counts)

    def embedded(*words: str) -> tuple[int, str]:
        out = tmp_path / f"out{len([*tmp_path.glob('out*')])}.h5ad"
        result = CliRunner().invoke(command, [*words, "-o", str(out)])
        if result.exit_code == 0:
            np.testing.assert_allclose(vectors(out), wanted, atol=1e-6)
        return result.exit_code, f"{result.output}{result.exception or ''}"

    one, two = str(tmp_path / "one.h5ad"), str(tmp_path / "two.h5ad")
    code, said = embedded(checkpoint, str(symbols))
    assert code == 0 and "matched" in said and "by var's column" not in said
    code, said = embedded(checkpoint, one)
    assert code == 0 and "matched, by var's column called" in said
    code, said = embedded(checkpoint, two)
    assert code == 1 and "and not the same" in said and f"{two}::called" in said
    assert embedded(checkpoint, f"{two}::called")[0] == 0
    assert embedded(checkpoint, two, "--gene-column", "called")[0] == 0
    code, said = embedded(str(by_ids), one)
    assert code == 1 and "--strip-versions would match" in said
    assert embedded(str(by_ids), one, "--strip-versions")[0] == 0


def test_what_cannot_be_is_refused_and_leaves_nothing(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = str(write(tmp_path / "in.h5ad", csr_matrix(counts)))
    (tmp_path / "there.h5ad").write_bytes(b"")
    with pytest.raises(OutputExistsError):
        embed(checkpoint, source, tmp_path / "there.h5ad", shown=False)
    with pytest.raises(SourceError, match="in the vocabulary"):
        embed(checkpoint, source, tmp_path / "o.h5ad", EmbedOptions(min_match=0.95), shown=False)
    with pytest.raises(SourceError, match="layer"):
        embed(checkpoint, source, tmp_path / "o.h5ad", EmbedOptions(layer="nope"), shown=False)
    with pytest.raises(ConfigError):
        EmbedOptions(layer="a", raw=True)
    empty = str(write(tmp_path / "empty.h5ad", csr_matrix((0, 60), dtype=np.float32)))
    with pytest.raises(SourceError, match="no cells"):
        embed(checkpoint, empty, tmp_path / "o.h5ad", shown=False)
    with pytest.raises(ConfigError, match="splits"):
        embed(checkpoint, source, tmp_path / "o.h5ad", EmbedOptions(split="train"), shown=False)
    with pytest.raises(ConfigError, match="domains"):
        options = EmbedOptions(domain_column="donor")
        embed(checkpoint, source, tmp_path / "o.h5ad", options, shown=False)
    (tmp_path / "sub").mkdir()
    same = str(write(tmp_path / "sub" / "in.h5ad", csr_matrix(counts)))
    with pytest.raises(ConfigError, match=r"two inputs would be written to in\.h5ad"):
        embed(checkpoint, [source, same], tmp_path / "o", shown=False)
    negative = str(write(tmp_path / "negative.h5ad", csr_matrix(counts - 1)))
    with pytest.raises(SourceError, match="negative"):
        embed(checkpoint, negative, tmp_path / "o.h5ad", shown=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "empty.h5ad",
        "in.h5ad",
        "negative.h5ad",
        "sub",
        "there.h5ad",
    ]


def test_what_a_killed_command_left_goes_with_the_next(
    tmp_path: Path, checkpoint: str, counts: np.ndarray
) -> None:
    source = str(write(tmp_path / "in.h5ad", csr_matrix(counts)))
    left = tmp_path / ".o.h5ad.applying"
    (left / "out").mkdir(parents=True)
    (left / "out" / "o.h5ad").write_bytes(b"half of it")
    with locked(left / LOCK), pytest.raises(OutputExistsError):
        embed(checkpoint, source, tmp_path / "o.h5ad", shown=False)
    embed(checkpoint, source, tmp_path / "o.h5ad", shown=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.h5ad", "o.h5ad"]
    assert vectors(tmp_path / "o.h5ad").shape[0] == len(counts)


def test_the_command(tmp_path: Path, checkpoint: str, counts: np.ndarray) -> None:
    source = str(write(tmp_path / "in.h5ad", csr_matrix(counts)))
    out = tmp_path / "deep" / "out.h5ad"
    result = CliRunner().invoke(command, [checkpoint, source, "-o", str(out), "--obsm", "X_mine"])
    assert (
        result.exit_code == 0
        and "70 cells as 16 numbers" in result.output
        and "1 cell without a gene" in result.output
    )
    with h5py.File(out) as f:
        assert f["obsm/X_mine"].shape == (70, 16)
