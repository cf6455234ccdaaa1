"""Vertex targets such as VOCASET's: which vertices are the lips, and errors that are called what they are.

Axes: N frames pooled over clips, V vertices with 3 coordinates each. Which of a mesh's vertices are
its lips is licensed data of the mesh's owners: it comes from the user, or there is no lip vertex error.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pmm import BadInput, NotFound
from pmm.train import metrics


def read_lip_vertices(path: Path, vertices: int) -> np.ndarray:
    """Numbers (L,) int64, from 0, of the lip vertices of a mesh that has so many, sorted.

    From a text file of numbers set apart by spaces, commas or lines, or an .npy of numbers (L,) or of
    a mask (V,) of booleans. Nothing in the file is executed: FLAME's own masks are a pickle, of which
    the list ``lips`` must be written out first. Raises NotFound or BadInput.
    """
    if not path.is_file():
        raise NotFound(f"no file of lip vertices at {path}; name a text file of vertex numbers or an .npy")
    found = _from_npy(path) if path.suffix == ".npy" else _from_text(path)
    if found.dtype == bool and found.shape == (vertices,):
        found = np.flatnonzero(found)
    if found.ndim != 1 or not len(found) or not np.issubdtype(found.dtype, np.integer):
        raise BadInput(
            f"{path}: {found.dtype} of shape {found.shape}; whole numbers of lip vertices were expected, or "
            f"a mask of {vertices} booleans"
        )
    if found.min() < 0 or found.max() >= vertices:
        wrong = found.min() if found.min() < 0 else found.max()
        raise BadInput(f"{path}: vertex {wrong} is not one of the mesh's {vertices}, which count from 0")
    return np.unique(found).astype(np.int64)


def _from_npy(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise BadInput(f"{path} is no .npy of numbers ({error}); write it by numpy.save") from None


def _from_text(path: Path) -> np.ndarray:
    try:
        words = path.read_text("utf-8-sig").replace(",", " ").split()
        return np.array([int(word) for word in words], np.int64)
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        raise BadInput(
            f"{path}: not a list of vertex numbers ({error}); write them as text, such as 1572 1573 1594"
        ) from None


def vertex_scores(
    prediction: np.ndarray, target: np.ndarray, lips: np.ndarray | None = None
) -> dict[str, float]:
    """Errors of vertices (N, V, 3) in the unit of the mesh, squared, and without the square as ``_l2``.

    ``vertex``: the mean over all vertices and frames. With ``lips`` (L,) also ``lve``: per frame the
    largest over the lip vertices, averaged over frames. Without them ``largest_vertex`` is the largest
    over all vertices, which is no lip vertex error and is not called one.
    """
    if prediction.ndim != 3:
        raise ValueError(f"prediction {prediction.shape} is not (frames, vertices, 3)")
    name, chosen = ("largest_vertex", slice(None)) if lips is None else ("lve", lips)
    near = prediction[:, chosen], target[:, chosen]
    return {
        "vertex": metrics.ale(prediction, target),
        "vertex_l2": metrics.ale_l2(prediction, target),
        name: metrics.lve(*near),
        f"{name}_l2": metrics.lve_l2(*near),
    }
