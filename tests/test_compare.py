"""Labels of any origin: what they must be, and what is said of those that are not."""

import pickle

import numpy as np
import pytest

from edgekd.core.artifact import File
from edgekd.errors import ConfigError, DataError
from edgekd.stages.bench.compare_files import check_labels, load_entry
from tests.test_export import one_node


@pytest.fixture
def exam(tmp_path):
    """A network with 3 classes, and 4 images."""
    path = one_node(tmp_path / "net.onnx", "Gemm", [1, 5], [1, 3], (5, 3))
    np.save(tmp_path / "inputs.npy", np.zeros((4, 5), np.float32))
    return File.of(tmp_path / "inputs.npy"), (load_entry(path, "net"),)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_class_numbers_of_any_integer_are_taken(tmp_path, exam, dtype):
    np.save(tmp_path / "labels.npy", np.array([0, 2, 1, 0], dtype))
    assert check_labels(tmp_path / "labels.npy", *exam) == File.of(tmp_path / "labels.npy")


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        (np.zeros((4, 1), int), r"holds int64 of shape \(4, 1\), not class numbers"),
        (np.zeros(4), r"holds float64 of shape \(4,\), not class numbers"),
        (np.zeros(4, bool), "holds bool"),
        (np.array(["cat"] * 4), "holds <U3"),
        (np.zeros(3, int), "holds 3 labels for 4 images"),
        (np.array([1, 2, 3, 1]), "holds numbers from 1 to 3, the classes are 0 to 2"),
        (np.array([0, -1, 2, 1]), "holds numbers from -1 to 2, the classes are 0 to 2"),
        (np.array([{}] * 4), "is not a readable .npy file of numbers"),
    ],
)
def test_other_arrays_are_refused(tmp_path, exam, labels, says):
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(DataError, match=says) as error:
        check_labels(tmp_path / "labels.npy", *exam)
    assert error.value.hint


def test_other_files_are_refused_and_pickles_not_run(tmp_path, exam):
    path = tmp_path / "labels.npy"
    with pytest.raises(ConfigError, match="there is no file"):
        check_labels(path, *exam)
    for content in (b"", b"0,1,2,0", b"PK\x03\x04 half an archive", pickle.dumps([0, 1, 2, 0])):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a readable .npy file of numbers"):
            check_labels(path, *exam)
    with path.open("wb") as stream:
        np.savez(stream, labels=np.zeros(4, int))
    with pytest.raises(DataError, match="is an archive of arrays"):
        check_labels(path, *exam)
