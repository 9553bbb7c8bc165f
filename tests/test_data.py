"""Data sets: fixed splits, exact pixels, and mistakes named in words."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from edgekd.core.augment import Augment
from edgekd.core.splits import stratified_split
from edgekd.data.digits import Digits
from edgekd.data.folder import Folder
from edgekd.errors import ConfigError, DataError
from edgekd.stages.distill.dataset import prepare_dataset
from edgekd.tasks.classification import Classification
from edgekd.training.dataloader import ArrayLoader
from tests import zoo


@pytest.fixture
def root(tmp_path):
    """Two classes, 10 training and 4 test images each; the grey level tells an image."""
    for part, count in (("train", 10), ("test", 4)):
        for c, name in enumerate(("cat", "dog")):
            home = tmp_path / part / name
            home.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 6), (c * 100 + i, 0, 0)).save(home / f"{i:02d}.png")
    return tmp_path


def test_digits_are_cut_into_three_fixed_stratified_splits():
    content = Digits().read(None)
    counts = [len(s.labels) for s in (content.train, content.valid, content.test)]
    assert counts == [1077, 270, 450]
    for split in (content.train, content.valid, content.test):
        share = np.bincount(split.labels) / len(split.labels)
        assert np.abs(share - 0.1).max() < 0.012
    again = Digits().read(None)
    assert all(np.array_equal(getattr(content, s).images, getattr(again, s).images) for s in ("train", "valid", "test"))


def test_no_digit_is_in_two_splits():
    content = Digits(size=16).read(None)
    seen = [image.tobytes() for s in (content.train, content.valid, content.test) for image in s.images]
    assert len(seen) == 1797
    assert len(set(seen)) >= 1796  # the set itself may hold a picture twice


def test_a_cut_keeps_the_shares_of_unequal_classes_and_is_the_same_every_time():
    labels = np.repeat([0, 1, 2], [100, 40, 10])
    chosen, others = stratified_split(labels, 30, seed=5)
    assert np.bincount(labels[chosen]).tolist() == [20, 8, 2]
    assert sorted([*chosen, *others]) == list(range(150))
    assert np.array_equal(chosen, stratified_split(labels, 30, seed=5)[0])
    assert not np.array_equal(chosen, stratified_split(labels, 30, seed=6)[0])


def test_a_folder_is_read_with_exact_pixels_and_labels(root):
    content = Folder(str(root), valid_fraction=0.2).read(None)
    assert content.classes == ("cat", "dog")
    assert [len(s.labels) for s in (content.train, content.valid, content.test)] == [16, 4, 8]
    assert content.train.images.shape == (16, 6, 8, 3)
    for split in (content.train, content.valid, content.test):
        assert np.array_equal(split.images[:, 0, 0, 0] // 100, split.labels)
    held = {image.tobytes() for image in content.valid.images}
    assert not held & {image.tobytes() for image in content.train.images}


def test_a_folder_s_fingerprint_sees_every_change_and_no_times(root):
    source = Folder(str(root))
    before = source.fingerprint()
    os.utime(root / "train" / "cat" / "00.png", (1, 1))
    assert before == source.fingerprint()
    Image.new("RGB", (8, 6), (7, 7, 7)).save(root / "train" / "cat" / "00.png")
    assert source.fingerprint() != before


def test_at_most_so_many_images_of_each_class_are_read(root):
    content = Folder(str(root), valid_fraction=0.25).read(4)
    assert len(content.train.labels) + len(content.valid.labels) == 8


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda r: (r / "train/cat/00.png").write_bytes(b"no image"), "1 of 20 images cannot be read"),
        (lambda r: [p.unlink() for p in (r / "train/dog").iterdir()], "holds no image"),
        (lambda r: (r / "test/dog").rename(r / "test/cow"), "different classes (cow, dog)"),
        (lambda r: [(r / p / "dog").rename(r / f"gone-{p}") for p in ("train", "test")], "one class only"),
        (lambda r: Image.new("RGB", (9, 9)).save(r / "train/cat/99.png"), "differ in size (8x6, 9x9"),
        (lambda r: (r / "test").rename(r / "tset"), "there is no folder"),
    ],
)
def test_a_broken_folder_is_named(root, harm, says):
    harm(root)
    with pytest.raises((DataError, ConfigError)) as error:
        source = Folder(str(root))
        source.fingerprint()
        source.read(None)
    assert says in str(error.value)
    assert error.value.hint


def test_a_truncated_image_is_named(root):
    path = root / "train/cat/00.png"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="00.png"):
        Folder(str(root)).read(None)


def test_an_image_that_ends_early_or_is_a_bomb_is_named(root, monkeypatch):
    (root / "train/cat/00.png").rename(root / "train/cat/00.gif")
    Image.effect_noise((8, 6), 50).save(root / "train/cat/00.gif")
    path = root / "train/cat/00.gif"
    path.write_bytes(path.read_bytes()[:-60])
    Image.new("RGB", (80, 60)).save(root / "train/dog/00.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError) as error:
        Folder(str(root)).read(None)
    assert "2 of 20 images cannot be read" in str(error.value)
    assert "00.gif" in str(error.value) and "decompression bomb" in str(error.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Folder("x", size=0), "data.size is 0"),
        (lambda: Folder("x", size=-3), "data.size is -3"),
        (lambda: Folder("x", crop=-1), "data.crop is -1"),
        (lambda: Digits(crop=-1), "data.crop is -1"),
    ],
)
def test_pixels_that_cannot_be_are_refused(make, says):
    with pytest.raises(ConfigError, match=says) as error:
        make()
    assert error.value.hint


def test_splits_of_different_sizes_are_refused(root, tmp_path_factory):
    for path in (root / "test").rglob("*.png"):
        Image.new("RGB", (5, 4)).save(path)
    with pytest.raises(DataError, match="train images are 8x6, test images 5x4") as error:
        prepare_dataset(tmp_path_factory.mktemp("out"), Folder(str(root), valid_fraction=0.2), None)
    assert error.value.hint == "set data.size"


def test_images_of_different_sizes_are_cut_to_one(root):
    Image.new("RGB", (30, 9)).save(root / "train" / "cat" / "99.png")
    assert Folder(str(root), size=6).read(None).train.images.shape[1:] == (6, 6, 3)


def test_a_class_without_validation_image_is_refused(tmp_path):
    class Uneven(zoo.Blobs):
        def read(self, limit):
            content = super().read(limit)
            content.valid.labels[:] = 0
            return content

    with pytest.raises(DataError, match="the valid split has no image of b, c"):
        prepare_dataset(tmp_path, Uneven(), None)


def test_inputs_are_normalised_to_mean_0_and_std_1(tmp_path):
    dataset = zoo.blobs_dataset(tmp_path)
    x = dataset.inputs(dataset.train.load().images)
    assert x.shape == (48, 1, 8, 8) and x.dtype == np.float32
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3


def test_the_feed_gives_the_network_what_the_task_says(tmp_path):
    dataset = zoo.blobs_dataset(tmp_path)
    arrays = dataset.train.load()
    feed = ArrayLoader(arrays, dataset, Augment(), torch.device("cpu"))
    x = torch.cat([x for x, _, _ in feed.ordered(16)])
    assert np.abs(x.numpy() - dataset.inputs(arrays.images)).max() < 1e-5


def test_an_epoch_holds_every_image_once_in_batches_of_like_size(tmp_path):
    dataset = zoo.blobs_dataset(tmp_path)
    feed = ArrayLoader(dataset.train.load(), dataset, Augment(), torch.device("cpu"))
    batches = list(feed.shuffled(11, seed=3))
    assert [len(y) for _, y, _ in batches] == [10, 10, 10, 9, 9]
    assert sorted(torch.cat([i for _, _, i in batches]).tolist()) == list(range(48))
    again = list(feed.shuffled(11, seed=3))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def augmented(images, augment):
    labels = torch.zeros(len(images), dtype=torch.int64)
    return Classification().transform(images, labels, augment, np.random.default_rng(0))[0]


def test_augmentation_shifts_over_black_and_mirrors():
    images = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 3, 3, 1).expand(200, 3, 3, 1)
    made = augmented(images, Augment(crop=1, flip=True))
    seen = {tuple(m.flatten().tolist()) for m in made}
    assert (1, 2, 3, 4, 5, 6, 7, 8, 9) in seen
    assert (3, 2, 1, 6, 5, 4, 9, 8, 7) in seen
    assert (0, 0, 0, 0, 1, 2, 0, 4, 5) in seen
    assert len(seen) == 18  # nine shifts, each mirrored or not
    assert torch.equal(augmented(images, Augment()), images)
