"""How well an embedding keeps classes together and mixes domains: avg_bio and what it is made of.

    nmi, ari    of a k-means clustering with the classes; of the k in `ks`, the one with the best NMI
    asw         silhouette of the classes, scaled to 0..1: (mean silhouette + 1) / 2
    avg_bio     the mean of these three, as scGPT has it
    asw_domain  1 - |silhouette of the domains|, the mean over a class's cells, then over classes
                (over all cells, without classes): 1 is mixed

These are scib's (Luecken et al., 2022, doi 10.1038/s41592-021-01336-8), but for the clustering: scib
takes Leiden's, at the resolution with the best NMI. Pure functions of arrays. Called by
evaluation.embeddings.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError

SEED = 0
"""Of k-means and PCA, so that the same embedding always gets the same numbers."""

CLASS_SCORES, DOMAIN_SCORE = ("avg_bio", "nmi", "ari", "asw"), "asw_domain"
"""What `scores` says, of classes and of domains."""

N_GENES, N_COMPONENTS = 2000, 50
"""The PCA that an embedding has to beat: so many genes of highest variance, so many components."""


def need_sklearn() -> None:
    """ConfigError unless scikit-learn is there."""
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ConfigError(
            "measuring integration needs scikit-learn",
            where="task.metric_cells",
            advice="pip install 'scshards[finetune]', or set task.metric_cells=0",
        ) from None


def ks(n_classes: int, n_cells: int) -> tuple[int, ...]:
    """The numbers of clusters that are tried: from half the classes to twice as many, at most eight."""
    low, high = max(2, n_classes // 2), max(2, min(2 * n_classes, n_cells - 1))
    return tuple(dict.fromkeys(np.linspace(low, max(low, high), 8).round().astype(int).tolist()))


def scores(
    vectors_ND: NDArray[np.floating],
    classes_N: NDArray[np.int64] | None,
    domains_N: NDArray[np.int64] | None,
) -> dict[str, float]:
    """The scores of an embedding; those that need what is None, or one category only, are left out.

    Parameters
    ----------
    vectors_ND
        float [cells, dimensions].
    classes_N, domains_N
        int64 [cells]: codes, all at least 0.
    """
    from sklearn.metrics import silhouette_score

    x = np.asarray(vectors_ND, np.float64)
    out: dict[str, float] = {}
    if classes_N is not None and _can_be_told_apart(classes_N):
        nmi, ari = _clustering(x, classes_N)
        asw = (float(silhouette_score(x, classes_N)) + 1) / 2
        out |= dict(zip(CLASS_SCORES, ((nmi + ari + asw) / 3, nmi, ari, asw), strict=True))
    if domains_N is not None:
        mixed = _mixing(x, classes_N, domains_N)
        if mixed is not None:
            out[DOMAIN_SCORE] = mixed
    return out


def most_variable(
    cells: NDArray[np.integer],
    genes: NDArray[np.integer],
    values: NDArray[np.floating],
    n_cells: int,
) -> NDArray[np.float64]:
    """float64 [cells, at most 2,000]: the genes of highest variance, of values given by cell and gene.

    What is not given is 0.
    """
    names, columns = np.unique(genes, return_inverse=True)
    values = values.astype(np.float64)
    mean = np.bincount(columns, values, len(names)) / n_cells
    variance = np.bincount(columns, values**2, len(names)) / n_cells - mean**2
    best = np.sort(np.argsort(-variance, kind="stable")[:N_GENES])
    place = np.full(len(names), -1)
    place[best] = np.arange(len(best))
    dense = np.zeros((n_cells, len(best)))
    kept = place[columns] >= 0
    dense[cells[kept], place[columns[kept]]] = values[kept]
    return dense


def leading_components(values_NG: NDArray[np.floating]) -> NDArray[np.float64]:
    """The first (at most) 50 principal components of [cells, genes], centred, not scaled."""
    from sklearn.decomposition import PCA

    n = min(N_COMPONENTS, len(values_NG) - 1, values_NG.shape[1])
    found: NDArray[np.float64] = PCA(n, random_state=SEED).fit_transform(values_NG)
    return found


def _clustering(x: NDArray[np.float64], classes: NDArray[np.int64]) -> tuple[float, float]:
    """NMI and ARI of the clustering with the best NMI."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found = []
    for k in ks(len(np.unique(classes)), len(x)):
        clusters = KMeans(k, n_init=10, random_state=SEED).fit_predict(x)
        nmi = float(normalized_mutual_info_score(classes, clusters))
        found.append((nmi, float(adjusted_rand_score(classes, clusters))))
    return max(found, key=lambda both: both[0])


def _mixing(
    x: NDArray[np.float64], classes: NDArray[np.int64] | None, domains: NDArray[np.int64]
) -> float | None:
    from sklearn.metrics import silhouette_samples

    each = []
    groups = np.zeros(len(x), np.int64) if classes is None else classes
    for group in np.unique(groups):
        rows = groups == group
        if _can_be_told_apart(domains[rows]):
            each.append(float(1 - np.abs(silhouette_samples(x[rows], domains[rows])).mean()))
    return float(np.mean(each)) if each else None


def _can_be_told_apart(codes: NDArray[np.int64]) -> bool:
    """Whether a silhouette is defined: more than one category, and fewer than there are cells."""
    return 1 < len(np.unique(codes)) < len(codes)
