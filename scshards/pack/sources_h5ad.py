"""h5ad files, local or behind any fsspec URL: AnnData in HDF5. Called by pack.sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scshards.pack.sources_anndata import AnnDataSource
from scshards.pack.sources_chunks import direct


class H5ad(AnnDataSource):
    """One h5ad file; see pack.sources.open_source for its arguments."""

    def _dense(self, node: Any) -> Any:
        return node

    def _parts(self, node: Any, shape: tuple[int, int], by_rows: bool) -> tuple[Any, Any, Any]:
        return node["indptr"], direct(node["indices"]), direct(node["data"])

    def _old_categories(self, frame: Any, node: Any) -> Any:
        return self._file[node.attrs["categories"]]

    def _names_in(self, group: Any) -> Sequence[str]:
        return list(group)
