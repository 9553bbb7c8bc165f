"""A folder of images: `root/train/<class>/*` and `root/test/<class>/*`, decoded with Pillow in parallel."""

from __future__ import annotations

import hashlib
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgekd.core.artifact import File
from edgekd.core.augment import Augment
from edgekd.core.dataset import Dataset, DatasetSplits, SplitArrays
from edgekd.core.plugins import unknown_name
from edgekd.core.splits import stratified_split
from edgekd.errors import ConfigError, DataError
from edgekd.utils.external import external_code
from edgekd.utils.paths import escapes_folder
from edgekd.utils.progress import progress_bar

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # whatever a file's name says; others start programs
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SHOWN = 3  # unreadable files that an error names
LARGEST = 50_000_000  # pixels of an image: 200 MB while it is decoded


@dataclass(frozen=True)
class Folder(Dataset):
    root: str
    valid_fraction: float = 0.1  # of the training images, held out for choices
    size: int | None = None  # resize the shorter side and cut the centre; None: all images have one size already
    grey: bool = False
    crop: int = 4
    flip: bool = True
    seed: int = 0  # of the train/valid cut
    only: tuple[str, ...] = ()  # leave out the other classes; empty: leave out none
    links: bool = False  # follow links that lead out of root

    def __post_init__(self) -> None:
        if len(self.only) == 1:
            raise ConfigError(f"data.only names one class (`{self.only[0]}`)", hint="a classifier needs two or more")
        if not 0 < self.valid_fraction < 1:
            raise ConfigError(
                f"data.valid_fraction is {self.valid_fraction}", hint="use a fraction between 0 and 1, such as 0.1"
            )
        if self.size is not None and self.size < 1:
            raise ConfigError(
                f"data.size is {self.size}", hint="use 1 pixel or more; without it images stay as they are"
            )
        if self.crop < 0:
            raise ConfigError(f"data.crop is {self.crop}", hint="use 0 or more pixels; 4 suits images of 32 pixels")

    @property
    def task(self) -> str:
        return "classification"

    @property
    def augment(self) -> Augment:
        return Augment(self.crop, self.flip)

    def fingerprint(self) -> str:
        """Return a hash of names and bytes. Not of times: a checkout in CI makes all files new."""
        total = hashlib.sha256()
        for part in ("train", "test"):
            for path in self.files(part):
                total.update(f"{path.relative_to(self.root)} {File.of(path).sha256}\n".encode())
        return total.hexdigest()

    def read(self, limit: int | None) -> DatasetSplits:
        classes = self.classes()
        trained, tested = self.decode("train", classes, limit), self.decode("test", classes, limit)
        held, kept = stratified_split(trained.labels, round(self.valid_fraction * len(trained.labels)), self.seed)
        return DatasetSplits(
            train=SplitArrays(trained.images[kept], trained.labels[kept]),
            valid=SplitArrays(trained.images[held], trained.labels[held]),
            test=tested,
            classes=classes,
        )

    def classes(self) -> tuple[str, ...]:
        """Return the class names: the folders under `train`, sorted. `test` must have the same."""
        folders = {part: self.class_folders(part) for part in ("train", "test")}
        if folders["train"] != folders["test"]:
            unpaired = sorted(set(folders["train"]) ^ set(folders["test"]))
            raise DataError(
                f"`{self.root}`: train and test hold different classes ({', '.join(unpaired[:SHOWN])})",
                hint="give both the same class folders",
            )
        if len(folders["train"]) < 2:
            raise DataError(
                f"`{self.root}/train` has one class only (`{folders['train'][0]}`)",
                hint="a classifier needs two class folders or more",
            )
        return tuple(folders["train"])

    def class_folders(self, part: str) -> list[str]:
        home = Path(self.root) / part
        if not home.is_dir():
            raise ConfigError(
                f"data.root: there is no folder `{home}`",
                hint="data.root needs train/<class>/ and test/<class>/ below it",
            )
        names = sorted(p.name for p in home.iterdir() if p.is_dir())
        if not names:
            raise DataError(
                f"`{home}` has no class folders", hint="put the images of each class in a folder of its own"
            )
        for name in self.only:
            if name not in names:
                raise unknown_name(f"data.only: `{home}` has no class folder `{name}`", name, names)
        return [name for name in names if name in self.only or not self.only]

    def files(self, part: str, limit: int | None = None) -> list[Path]:
        """Return the images of a part, in a fixed order; at most `limit` of each class."""
        paths = []
        for name in self.class_folders(part):
            home = Path(self.root) / part / name
            images = sorted(p for p in home.iterdir() if p.suffix.lower() in SUFFIXES)
            if not images:
                raise DataError(f"class folder `{home}` holds no image", hint="remove it, or put images there")
            self.check(home, images[:limit])
            paths += images[:limit]
        return paths

    def check(self, home: Path, images: list[Path]) -> None:
        """Raise DataError for what is no file, or not within root: where links lead to would go into bundles."""
        for path in images:
            if not path.is_file():
                raise DataError(f"`{path}` is no file", hint="remove it")
        for path in (home, *(path for path in images if path.is_symlink())):
            if not self.links and escapes_folder(Path(self.root), path.relative_to(self.root).as_posix()):
                raise DataError(
                    f"`{path}` leads out of `{self.root}`, to `{os.path.realpath(path)}`",
                    hint="set `data.links: true` if the links are yours; do not use the data set if they are not",
                )

    def decode(self, part: str, classes: tuple[str, ...], limit: int | None) -> SplitArrays:
        paths = self.files(part, limit)
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number[p.parent.name] for p in paths], np.int64)
        failed: list[str] = []
        sizes: set[tuple[int, ...]] = set()
        kept = np.empty(0, np.uint8)

        def one(path: Path) -> np.ndarray | None:
            try:
                return self.image(path)
            except DataError as error:
                failed.append(f"{path} ({error.what})")
                return None

        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            progress_bar(f"decode {part}", len(paths)) as advance,
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of Pillow: about what it reads all the same
            for index, image in enumerate(pool.map(one, paths)):
                if image is not None and not sizes:
                    kept = room(part, len(paths), image.shape)
                if image is not None:
                    sizes.add(image.shape)
                    if len(sizes) == 1:
                        kept[index] = image
                advance()
        if failed:
            raise DataError(
                f"{len(failed)} of {len(paths)} images cannot be read: {'; '.join(sorted(failed)[:SHOWN])}",
                hint="fix or remove them",
            )
        if len(sizes) > 1:
            some = ", ".join(f"{w}x{h}" for h, w, _ in sorted(sizes)[:SHOWN])
            raise DataError(f"the images of `{part}` differ in size ({some} ...)", hint="set data.size")
        return SplitArrays(kept, labels)

    def image(self, path: Path) -> np.ndarray:
        """(H, W, C) uint8: the first picture of a file, 16 bits cut to 8, transparency left out.

        Raises DataError if it is none, too large, or of numbers that are no grey levels.
        """
        from PIL import Image, ImageOps

        with (
            external_code("it is not whole, or no image", "fix or remove it", DataError),
            Image.open(path, formats=FORMATS) as opened,
        ):
            if opened.width * opened.height > LARGEST:
                raise DataError(f"{opened.width}x{opened.height} pixels are more than {LARGEST / 1e6:.0f} million")
            image = eight_bits(opened).convert("L" if self.grey else "RGB")
        if self.size is not None:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(image.height, image.width, -1)


def eight_bits(image: Image) -> Image:
    """Return the picture, with 8 bits where it has 16 in grey. Raises DataError for numbers that need a scale."""
    from PIL import Image as pillow

    if image.mode.startswith("I;16"):
        return pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError("its pixels are numbers of 32 bits, whose black and white are not known")
    return image


def room(part: str, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return an array for so many images. Raises DataError where this machine has no memory for them."""
    needed, here = count * int(np.prod(shape)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > here:
        raise DataError(
            f"the {count} images of `{part}` take {needed / 1e9:.1f} GB, and this machine has {here / 1e9:.1f} GB",
            hint="set data.size",
        )
    return np.empty((count, *shape), np.uint8)


PLUGIN = Folder
