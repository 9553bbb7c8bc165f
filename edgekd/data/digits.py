"""The 1,797 handwritten digits that scikit-learn bundles (UCI Optical Recognition of Handwritten Digits)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekd.core.augment import Augment
from edgekd.core.dataset import Dataset, DatasetSplits, SplitArrays
from edgekd.core.splits import stratified_split
from edgekd.errors import ConfigError

TEST, VALID = 450, 270  # about 25 % and 15 % of 1,797
SPLIT_SEED = 0  # the splits are fixed: results on them can be compared


@dataclass(frozen=True)
class Digits(Dataset):
    size: int = 16  # pixels; the originals have 8
    crop: int = 1

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ConfigError(f"data.size is {self.size}", hint="use 8, the size of the originals, or more")
        if self.crop < 0:
            raise ConfigError(f"data.crop is {self.crop}", hint="use 0 or more pixels; 1 suits images this small")

    @property
    def task(self) -> str:
        return "classification"

    @property
    def augment(self) -> Augment:
        return Augment(self.crop, flip=False)

    def fingerprint(self) -> str:
        from importlib.metadata import version

        return f"scikit-learn {version('scikit-learn')}"

    def read(self, limit: int | None) -> DatasetSplits:
        from PIL import Image
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = np.round(bunch.images * (255 / 16)).astype(np.uint8)  # the originals count to 16
        scaled = [
            np.asarray(Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BILINEAR))
            for image in grey
        ]
        images, labels = np.stack(scaled)[..., None], bunch.target.astype(np.int64)
        test, rest = stratified_split(labels, TEST, SPLIT_SEED)
        held, kept = stratified_split(labels[rest], VALID, SPLIT_SEED + 1)
        train, valid = rest[kept], rest[held]
        parts = [first(limit, labels, part) for part in (train, valid, test)]
        training, validation, testing = (SplitArrays(images[part], labels[part]) for part in parts)
        return DatasetSplits(training, validation, testing, classes=tuple(str(d) for d in range(10)))


def first(limit: int | None, labels: np.ndarray, part: np.ndarray) -> np.ndarray:
    """Return the first `limit` members of each class among the indices `part`."""
    if limit is None:
        return part
    return np.sort(np.concatenate([part[labels[part] == label][:limit] for label in np.unique(labels)]))


PLUGIN = Digits
