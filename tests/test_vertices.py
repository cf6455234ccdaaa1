"""Lip vertices from the user's file, and errors that are called what they are."""

import pickle

import numpy as np
import pytest

from pmm import BadInput, NotFound
from pmm.train.vertices import read_lip_vertices, vertex_scores


def test_lip_vertices_as_text_and_as_numpy(tmp_path):
    (tmp_path / "lips.txt").write_text("7, 3\n4\t3\n")
    np.save(tmp_path / "lips.npy", np.array([7, 3, 4], np.uint16))
    np.save(tmp_path / "mask.npy", np.isin(np.arange(9), [3, 4, 7]))
    for name in ("lips.txt", "lips.npy", "mask.npy"):
        found = read_lip_vertices(tmp_path / name, 9)
        assert (found.dtype, found.tolist()) == (np.int64, [3, 4, 7])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            b"1 2 nine",
            r"a.txt: not a list of vertex numbers \(invalid literal .*'nine'\); write them as",
        ),
        (
            "b.txt",
            b"",
            r"b.txt: int64 of shape \(0,\); whole numbers of lip vertices were expected, or a mask of 9",
        ),
        ("c.txt", b"3 9", r"c.txt: vertex 9 is not one of the mesh's 9, which count from 0"),
        ("d.txt", b"-1 3", r"d.txt: vertex -1 is not one of the mesh's 9"),
        ("e.npy", b"\x93NUMPY", r"e.npy is no .npy of numbers"),
        ("f.pkl", pickle.dumps({"lips": [1]}), r"f.pkl: not a list of vertex numbers"),
    ],
)
def test_what_is_no_list_of_lip_vertices_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read_lip_vertices(tmp_path / name, 9)
    assert "\n" not in str(caught.value)


def test_other_arrays_and_no_file_are_one_line(tmp_path):
    np.save(tmp_path / "short.npy", np.ones(8, bool))
    np.save(tmp_path / "real.npy", np.ones(3))
    np.save(tmp_path / "pickled.npy", np.array([{"lips": 1}], object), allow_pickle=True)
    for name in ("short.npy", "real.npy", "pickled.npy"):
        with pytest.raises(BadInput, match=name):
            read_lip_vertices(tmp_path / name, 9)
    with pytest.raises(NotFound, match=r"no file of lip vertices at .*none.txt; name a text file of vertex"):
        read_lip_vertices(tmp_path / "none.txt", 9)


def test_vertex_errors_by_hand():
    """Two frames of three vertices: errors 5, 1, 0, then 0, 2, 10; the lips are the first two."""
    target = np.zeros((2, 3, 3))
    prediction = np.array([[[3.0, 4, 0], [0, 0, 1], [0, 0, 0]], [[0, 0, 0], [0, 2, 0], [6, 0, 8]]])
    assert vertex_scores(prediction, target, np.array([0, 1])) == {
        "vertex": pytest.approx((25 + 1 + 4 + 100) / 6),
        "vertex_l2": pytest.approx((5 + 1 + 2 + 10) / 6),
        "lve": pytest.approx((25 + 4) / 2),
        "lve_l2": pytest.approx((5 + 2) / 2),
    }


def test_without_lips_nothing_is_called_lip_vertex_error():
    prediction, target = np.zeros((1, 2, 3)), np.zeros((1, 2, 3))
    prediction[0, 1] = [0, 3, 4]
    assert vertex_scores(prediction, target) == {
        "vertex": 12.5,
        "vertex_l2": 2.5,
        "largest_vertex": 25.0,
        "largest_vertex_l2": 5.0,
    }
    with pytest.raises(ValueError, match=r"\(2, 3\) is not \(frames, vertices, 3\)"):
        vertex_scores(np.zeros((2, 3)), np.zeros((2, 3)))
