"""Inputs as a person names them: files, patterns, directories; local and on S3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pack_support import counts, quiet_pack, tree_sums, vocab_of, write

from scshards.base.errors import ConfigError, ScshardsError, SourceError, StorageError
from scshards.sources.inputs import expand
from scshards.sources.vocabulary import build_vocab, check_vocab


def tree(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


def names(root: Path | str, inputs: Any) -> list[str]:
    return [file.url.removeprefix(f"{root}/") for file in expand(inputs)]


def test_local_patterns_and_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(
        tmp_path / "d",
        *("b.h5ad", "a.h5ad", "a10.h5", "notes.txt", "deep/er/c.h5ad", "deep/x.h5ad", "deep/y.csv"),
        *("run/matrix.mtx.gz", "run/barcodes.tsv.gz", "old/matrix.mtx", "empty/readme"),
    )
    everything = ["a.h5ad", "a10.h5", "b.h5ad", "deep/er/c.h5ad", "deep/x.h5ad", "old", "run"]
    assert (
        names(root, root) == names(root, f"{root}/") == names(root, f"file://{root}") == everything
    )
    assert names(root, f"{root}/*.h5ad") == ["a.h5ad", "b.h5ad"]
    assert names(root, f"{root}/?.h5ad") == ["a.h5ad", "b.h5ad"]
    assert names(root, f"{root}/[!b]*.h5*") == ["a.h5ad", "a10.h5"]
    assert names(root, f"{root}/**/*.h5ad") == [e for e in everything if e.endswith(".h5ad")]
    assert names(root, f"{root}/d*/*.h5ad") == ["deep/x.h5ad"]
    assert names(root, f"{root}/[or]*") == ["old", "run"]
    assert names(root, [f"{root}/deep", root / "b.h5ad"]) == [
        "deep/er/c.h5ad",
        "deep/x.h5ad",
        "b.h5ad",
    ]
    assert names(root, root / "run") == ["run"]
    assert names(root, root / "none.h5ad") == ["none.h5ad"]  # opening it says that it is not there
    monkeypatch.chdir(root)
    assert [i.url for i in expand("*.h5ad")] == ["a.h5ad", "b.h5ad"]
    assert [i.url for i in expand(".")][:2] == ["a.h5ad", "a10.h5"]


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    tree(tmp_path, "a[1].h5ad", "a1.h5ad", "all*/b.h5ad")
    assert names(tmp_path, tmp_path / "a[1].h5ad") == ["a[1].h5ad"]
    assert names(tmp_path, tmp_path / "all*") == ["all*/b.h5ad"]


def test_inputs_that_are_none(tmp_path: Path) -> None:
    tree(tmp_path, "a.h5ad", "empty/readme")
    for inputs, fault in (
        ([], "no input was given"),
        (f"{tmp_path}/*.h5", "no file matches"),
        (f"{tmp_path}/nowhere/*.h5ad", "no such file"),
        (f"{tmp_path}/a**", "can't be used"),
        (tmp_path / "empty", "holds no .h5ad"),
        ("memory://nowhere/*.h5ad", "no file matches"),
        ("memory://nowhere/", "holds no .h5ad"),
        ([tmp_path, tmp_path / "a.h5ad"], "given twice"),
    ):
        with pytest.raises(ScshardsError, match=fault):
            expand(inputs)
        with pytest.raises(ScshardsError, match=fault):
            quiet_pack(inputs, tmp_path / "out", vocab_of(3))
        with pytest.raises(ScshardsError, match=fault):
            build_vocab(inputs)
    assert not (tmp_path / "out").exists()


def test_packs_of_a_pattern_and_of_its_files(tmp_path: Path) -> None:
    paths = [write(tmp_path / "d" / f"{i}.h5ad", counts(9, 5, seed=i)) for i in _made(tmp_path)]
    one = quiet_pack(paths, tmp_path / "one", vocab_of(5))
    for i, inputs in enumerate((tmp_path / "d", f"{tmp_path}/d/*.h5ad")):
        two = quiet_pack(inputs, tmp_path / f"two{i}", vocab_of(5))
        assert (
            [s.name for s in two.sources] == [s.name for s in one.sources] == list(map(str, paths))
        )
        assert tree_sums(tmp_path / f"two{i}") == tree_sums(tmp_path / "one")
        assert [r.name for r in check_vocab(vocab_of(5), inputs)] == list(map(str, paths))
        assert build_vocab(inputs) == build_vocab(paths)


def test_stores_are_inputs_and_what_is_in_them_is_not(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "d",
        *("a.zarr/zarr.json", "a.zarr/X/zarr.json", "a.zarr/b.h5ad", "deep/two/.zgroup"),
        *("deep/two/obs/.zgroup", "lost.zarr/X/.zarray", "other.zip", "c.h5ad"),
    )
    everything = ["a.zarr", "c.h5ad", "deep/two", "lost.zarr"]
    assert names(root, root) == everything
    assert names(root, root / "a.zarr") == ["a.zarr"]
    assert names(root, f"{root}/*.zarr") == ["a.zarr", "lost.zarr"]
    assert names(root, f"{root}/**/*.h5ad") == ["c.h5ad"]
    assert names(root, f"{root}/**/t*") == ["deep/two"]
    (root / "link.zarr").symlink_to(tree(tmp_path, "elsewhere/.zgroup") / "elsewhere")
    (root / "circle").symlink_to(root)
    assert names(root, root) == sorted([*everything, "link.zarr"])


def test_a_list_of_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "in/a.h5ad", "in/b.h5ad", "in/x y/c.h5ad", "in/more/d.h5", "far.h5ad")
    text = (
        "\ufeff# what we have\r\n\r\na.h5ad\tfirst one\r\nx y/*.h5ad\t third \n"
        f"more\n{tmp_path}/far.h5ad\tfar\ns3://b/e.h5ad\nb.h5ad\t\n"
    )
    want = [
        (f"{tmp_path}/in/a.h5ad", "first one"),
        (f"{tmp_path}/in/x y/c.h5ad", "third"),
        (f"{tmp_path}/in/more/d.h5", f"{tmp_path}/in/more/d.h5"),
        (f"{tmp_path}/far.h5ad", "far"),
        ("s3://b/e.h5ad", "s3://b/e.h5ad"),
        (f"{tmp_path}/in/b.h5ad", f"{tmp_path}/in/b.h5ad"),
    ]
    for name, given in (
        ("l.txt", ""),
        ("l.tsv", ""),
        ("l", "@"),
        ("l.txt", "@"),
        ("l", "@file://"),
    ):
        (tmp_path / "in" / name).write_text(text, newline="")
        assert [file[:2] for file in expand(f"{given}{tmp_path}/in/{name}")] == want
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in" / "short.txt").write_text("a.h5ad")
    assert [file[:2] for file in expand(["far.h5ad", "in/short.txt"])] == [
        ("far.h5ad", "far.h5ad"),
        ("in/a.h5ad", "in/a.h5ad"),
    ]


def test_hidden_names_are_no_inputs(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "d",
        *(
            "s1.h5ad",
            "._s1.h5ad",
            ".ipynb_checkpoints/s1-checkpoint.h5ad",
            "x/._s2.h5ad",
            "x/s2.h5ad",
        ),
        *(".cache/run/matrix.mtx", "x/.z.zarr/.zgroup", "z.zarr/.zgroup"),
    )
    for given in (root, f"{root}/**/*"):
        assert names(root, given) == ["s1.h5ad", "x/s2.h5ad", "z.zarr"]
    assert names(root, f"{root}/*.h5ad") == ["s1.h5ad"]
    assert names(root, f"{root}/**/*.h5ad") == ["s1.h5ad", "x/s2.h5ad"]
    # Who begins with a dot means it.
    assert names(root, f"{root}/.*.h5ad") == ["._s1.h5ad"]
    assert names(root, f"{root}/.ipynb*/*") == [".ipynb_checkpoints/s1-checkpoint.h5ad"]
    assert names(root, root / ".cache") == [".cache/run"]
    (tmp_path / "e" / ".hidden").mkdir(parents=True)
    tree(tmp_path / "e", "._a.h5ad", ".hidden/b.h5ad")
    with pytest.raises(ConfigError, match="the directory holds no"):
        expand(tmp_path / "e")


RAW, FILTERED = "raw_feature_bc_matrix", "filtered_feature_bc_matrix"


@pytest.mark.parametrize(
    ("files", "meant"),
    [
        ((f"outs/{RAW}.h5", f"outs/{FILTERED}.h5"), f"outs/{FILTERED}.h5"),
        ((f"outs/{FILTERED}.h5", f"outs/{FILTERED}/matrix.mtx.gz"), f"outs/{FILTERED}"),
        ((f"outs/{FILTERED}/matrix.mtx.gz", f"outs/{RAW}/matrix.mtx.gz"), f"outs/{FILTERED}"),
        (
            ("o/raw_gene_bc_matrices_h5.h5", "o/filtered_gene_bc_matrices/hg19/matrix.mtx"),
            "o/filtered_gene_bc_matrices/hg19",
        ),
        ((f"GSM1_a_{RAW}.h5", f"GSM1_a_{FILTERED}.h5"), f"GSM1_a_{FILTERED}.h5"),
        ((f"c/sample_{FILTERED}.h5", f"c/sample_{RAW}.h5"), f"c/sample_{FILTERED}.h5"),
        (("x/a.h5ad", "x/a.zarr/.zgroup"), "x/a.h5ad"),
    ],
)
def test_one_matrix_twice_in_a_directory(
    tmp_path: Path, files: tuple[str, str], meant: str
) -> None:
    root = tree(tmp_path / "d", *files)
    for given in (root, f"{root}/**/*"):
        with pytest.raises(ConfigError, match="one matrix is there twice") as refused:
            expand(given)
        assert f"name the one that is meant: {root}/{meant}," in str(refused.value.advice)
    paths = [root / f.removesuffix("/.zgroup").removesuffix("/matrix.mtx") for f in files]
    paths = [p.parent if p.name == "matrix.mtx.gz" else p for p in paths]
    assert len(expand(paths)) == 2, "who names both means both"


def test_runs_side_by_side_are_not_one_matrix(tmp_path: Path) -> None:
    files = [f"{s}/outs/{FILTERED}.h5" for s in ("s1", "s2")]
    files += ["raw_a.h5ad", "filtered_a.h5ad", f"{FILTERED}/a.h5ad", f"{FILTERED}/b.h5ad"]
    assert names(tmp_path / "d", tree(tmp_path / "d", *files)) == sorted(files)


def test_two_names_of_one_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "a.h5ad", "deep/b.h5ad")
    (tmp_path / "link.h5ad").symlink_to("a.h5ad")
    (tmp_path / "up").symlink_to("deep")
    monkeypatch.chdir(tmp_path)
    for pair in (
        ("a.h5ad", "./a.h5ad"),
        ("a.h5ad", tmp_path / "a.h5ad"),
        ("a.h5ad", "deep/../a.h5ad"),
        ("a.h5ad", "link.h5ad"),
        ("deep/b.h5ad", "up/b.h5ad"),
        ("a.h5ad", f"file://{tmp_path}/a.h5ad"),
        ("a.h5ad", "a.h5ad::symbol"),
        ("s3://b/m.zarr", "s3://b/m.zarr/"),
    ):
        with pytest.raises(ConfigError, match="given twice"):
            expand(pair)


def test_a_column_for_each_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "in/a.h5ad", "in/b.h5ad", "in/o::dd.h5ad", "in/x::y", "in/m/matrix.mtx")
    (tmp_path / "in/l.txt").write_text(
        "a.h5ad::gene_name\nb.h5ad\tsecond\n./o::dd.h5ad\nm/::gene ids\tthird\ns3://b/c.h5ad::id\n"
    )
    monkeypatch.chdir(tmp_path / "in")

    def columns(*given: str) -> list[tuple[str, str | None]]:
        return [(f.url.removeprefix(f"{tmp_path}/in/"), f.gene_column) for f in expand(given)]

    assert columns("a.h5ad::feature_name", "b.h5ad") == [
        ("a.h5ad", "feature_name"),
        ("b.h5ad", None),
    ]
    assert expand("a.h5ad::index")[0].name == "a.h5ad"
    assert columns("[ab].h5ad::index") == [("a.h5ad", "index"), ("b.h5ad", "index")]
    assert columns(f"{tmp_path}/in/m/::gene_ids") == [("m/", "gene_ids")]
    of_list = [("a.h5ad", "gene_name"), ("b.h5ad", None), ("o::dd.h5ad", None), ("m/", "gene ids")]
    assert columns("l.txt") == [*of_list, ("s3://b/c.h5ad", "id")]
    assert [c for _, c in columns("@l.txt::symbol")] == [
        "gene_name",
        "symbol",
        "symbol",
        "gene ids",
        "id",
    ]
    # A path that is there, the keys of objects and chains of file systems are what they say.
    for whole in ("./x::y", f"{tmp_path}/in/o::dd.h5ad", "s3://b/a::b.h5ad", "s3://b/x.h5ad::y.h5ad",
                  "s3://b/run::1", "simplecache::s3://b/a.h5ad"):  # fmt: skip
        assert columns(whole) == [(whole.removeprefix(f"{tmp_path}/in/"), None)]
    assert columns("s3://b/a::b.h5ad::id") == [("s3://b/a::b.h5ad", "id")]
    assert columns("https://h/a.h5ad::feature_name") == [("https://h/a.h5ad", "feature_name")]


@pytest.mark.parametrize(
    ("text", "fault", "where"),
    [
        ("", "names no input", "l.txt"),
        ("# nothing\n\n", "names no input", "l.txt"),
        ("a.h5ad\tx\ty\n", "not an input", "line 1"),
        ("a.h5ad\n\tname\n", "not an input", "line 2"),
        ("a.h5ad\tb\x07\n", "not an input", "line 1"),
        ("a.h5ad\nother.txt\n", "another list", "line 2"),
        ("\n*.h5ad\tboth\n", "one name is given to 2 inputs", "line 2"),
        ("*.zarr\n", "no file matches", "line 1"),
        ("a.h5ad\n./a.h5ad\n", "given twice", "a.h5ad"),
        ("a.h5ad\tx\nb.h5ad\tx\n", "same name", "x"),
        ("a.h5ad\t\nb.h5ad\ta.h5ad\n", None, ""),
        (b"\xff\xfe\x00", "UTF-8", "l.txt"),
    ],
)
def test_lists_that_are_refused(
    tmp_path: Path, text: str | bytes, fault: str | None, where: str
) -> None:
    tree(tmp_path, "a.h5ad", "b.h5ad")
    path = tmp_path / "l.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if fault is None:
        assert len(expand(path)) == 2
        return
    with pytest.raises(ConfigError, match=fault) as refused:
        expand(path)
    assert where in str(refused.value.where)


def test_lists_that_can_not_be_read(tmp_path: Path) -> None:
    for given in (f"{tmp_path}/none.txt", f"@{tmp_path}/none", "memory://none/l.txt"):
        with pytest.raises(StorageError, match="no such file"):
            expand(given)


def test_the_names_of_a_list_are_in_the_manifest(tmp_path: Path) -> None:
    for i in _made(tmp_path):
        write(tmp_path / "d" / f"{i}.h5ad", counts(9, 5, seed=i))
    (tmp_path / "d" / "in.txt").write_text("2.h5ad\tlung\n0.h5ad\tliver\n")
    for workers in (1, 2):
        manifest = quiet_pack(
            tmp_path / "d" / "in.txt", tmp_path / f"o{workers}", vocab_of(5), workers=workers
        )
        assert [s.name for s in manifest.sources] == ["lung", "liver"]
    assert tree_sums(tmp_path / "o1") == tree_sums(tmp_path / "o2")
    reports = check_vocab(vocab_of(5), tmp_path / "d" / "in.txt")
    assert [r.name for r in reports] == ["lung", "liver"]
    with pytest.raises(SourceError) as refused:
        quiet_pack(tmp_path / "d" / "in.txt", tmp_path / "o3", vocab_of(5), layer="none")
    assert "lung" in str(refused.value)


def _made(tmp_path: Path) -> range:
    (tmp_path / "d").mkdir()
    return range(3)


def test_patterns_and_directories_on_s3(tmp_path: Path, s3: Any) -> None:
    import s3fs

    data = write(tmp_path / "x.h5ad", counts(6, 4)).read_bytes()
    fs = s3fs.S3FileSystem()
    for path in ("in/b.h5ad", "in/a.h5ad", "in/deep/er/c.h5ad", "in/a.csv", "in/x*.h5ad"):
        fs.pipe_file(f"{s3.url}/{path}", data)
    root = f"{s3.url}/in"
    assert names(root, f"{root}/") == ["a.h5ad", "b.h5ad", "deep/er/c.h5ad", "x*.h5ad"]
    assert names(root, f"{root}/[ab]*.h5ad") == ["a.h5ad", "b.h5ad"]
    assert names(root, f"{root}/**/*.h5ad") == ["a.h5ad", "b.h5ad", "deep/er/c.h5ad", "x*.h5ad"]
    assert names(s3.url, f"{s3.url}/*/b.h5ad") == ["in/b.h5ad"]
    assert names(root, f"{root}/x*.h5ad") == ["x*.h5ad"]
    manifest = quiet_pack(f"{root}/[ab]*.h5ad", tmp_path / "out", vocab_of(4))
    assert [s.name for s in manifest.sources] == [f"{root}/a.h5ad", f"{root}/b.h5ad"]
    fs.pipe_file(f"{root}/list.tsv", b"a.h5ad\tfirst\ndeep/**/*.h5ad\n")
    assert [file[:2] for file in expand(f"{root}/list.tsv")] == [
        (f"{root}/a.h5ad", "first"),
        (f"{root}/deep/er/c.h5ad", f"{root}/deep/er/c.h5ad"),
    ]
    for path in ("s/a.zarr/zarr.json", "s/a.zarr/X/zarr.json", "s/m/matrix.mtx.gz", "s/n/.zgroup"):
        fs.pipe_file(f"{s3.url}/{path}", b"")
    assert names(s3.url, f"{s3.url}/s/") == ["s/a.zarr", "s/m", "s/n"]
    assert names(s3.url, f"{s3.url}/s/*") == ["s/a.zarr", "s/m", "s/n"]
    assert names(s3.url, f"{s3.url}/s/**") == ["s/a.zarr", "s/m", "s/n"]
    assert names(s3.url, [f"{s3.url}/s/a.zarr/", f"{s3.url}/s/m/"]) == ["s/a.zarr", "s/m"]
    with pytest.raises(ConfigError, match="no file matches"):
        expand(f"{root}/*.h5")
    with pytest.raises((ConfigError, StorageError)):
        expand("s3://no-such-bucket-at-all/*.h5ad")
