"""A folder of images: `root/train/<class>/*` and `root/test/<class>/*`, decoded with Pillow in parallel."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekd.core.errors import ConfigError, DataError
from edgekd.core.plugins import unknown
from edgekd.core.progress import bar
from edgekd.core.splits import stratified
from edgekd.core.task import Arrays, Augment, Content, Source

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
SHOWN = 3  # unreadable files that an error names


@dataclass(frozen=True)
class Folder(Source):
    root: str
    valid: float = 0.1  # share of the training images that is held out for choices
    size: int | None = None  # resize the shorter side and cut the centre; None: all images have one size already
    grey: bool = False
    crop: int = 4
    flip: bool = True
    seed: int = 0  # of the train/valid cut
    only: tuple[str, ...] = ()  # leave out the other classes; empty: leave out none

    def __post_init__(self) -> None:
        if len(self.only) == 1:
            raise ConfigError(f"data.only names one class (`{self.only[0]}`)", hint="a classifier needs two or more")
        if not 0 < self.valid < 1:
            raise ConfigError(f"data.valid is {self.valid}", hint="use a share between 0 and 1, such as 0.1")
        if self.size is not None and self.size < 1:
            raise ConfigError(
                f"data.size is {self.size}", hint="use 1 pixel or more; without it images stay as they are"
            )
        if self.crop < 0:
            raise ConfigError(f"data.crop is {self.crop}", hint="use 0 or more pixels; 4 suits images of 32 pixels")

    @property
    def augment(self) -> Augment:
        return Augment(self.crop, self.flip)

    def fingerprint(self) -> str:
        total = hashlib.sha256()
        for part in ("train", "test"):
            for path in self.files(part):
                stat = path.stat()
                total.update(f"{path.relative_to(self.root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return total.hexdigest()

    def read(self, limit: int | None) -> Content:
        classes = self.classes()
        trained, tested = self.decode("train", classes, limit), self.decode("test", classes, limit)
        held, kept = stratified(trained.labels, round(self.valid * len(trained.labels)), self.seed)
        return Content(
            train=Arrays(trained.images[kept], trained.labels[kept]),
            valid=Arrays(trained.images[held], trained.labels[held]),
            test=tested,
            classes=classes,
        )

    def classes(self) -> tuple[str, ...]:
        """The class names: the folders under `train`, sorted. `test` must have the same."""
        found = {part: self.class_folders(part) for part in ("train", "test")}
        if found["train"] != found["test"]:
            odd = sorted(set(found["train"]) ^ set(found["test"]))
            raise DataError(
                f"`{self.root}`: train and test hold different classes ({', '.join(odd[:SHOWN])})",
                hint="give both the same class folders",
            )
        if len(found["train"]) < 2:
            raise DataError(
                f"`{self.root}/train` has one class only (`{found['train'][0]}`)",
                hint="a classifier needs two class folders or more",
            )
        return tuple(found["train"])

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
                raise unknown(f"data.only: `{home}` has no class folder `{name}`", name, names)
        return [name for name in names if name in self.only or not self.only]

    def files(self, part: str, limit: int | None = None) -> list[Path]:
        """The images of a part, in a fixed order; at most `limit` of each class."""
        found = []
        for name in self.class_folders(part):
            home = Path(self.root) / part / name
            images = sorted(p for p in home.iterdir() if p.suffix.lower() in SUFFIXES)
            if not images:
                raise DataError(f"class folder `{home}` holds no image", hint="remove it, or put images there")
            found += images[:limit]
        return found

    def decode(self, part: str, classes: tuple[str, ...], limit: int | None) -> Arrays:
        from PIL.Image import DecompressionBombError

        broken = (OSError, ValueError, SyntaxError, EOFError, DecompressionBombError)  # what Pillow raises for files
        paths = self.files(part, limit)
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number[p.parent.name] for p in paths], np.int64)
        failed: list[str] = []

        def one(path: Path) -> np.ndarray | None:
            try:
                return self.image(path)
            except broken as error:
                failed.append(f"{path} ({error})")
                return None

        images: list[np.ndarray | None] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar(f"decode {part}", len(paths)) as advance:
            for image in pool.map(one, paths, chunksize=64):
                images.append(image)
                advance()
        if failed:
            raise DataError(
                f"{len(failed)} of {len(paths)} images cannot be read: {'; '.join(sorted(failed)[:SHOWN])}",
                hint="mend or remove them",
            )
        whole = [image for image in images if image is not None]
        shapes = {image.shape for image in whole}
        if len(shapes) > 1:
            sizes = ", ".join(f"{w}x{h}" for h, w, _ in sorted(shapes)[:SHOWN])
            raise DataError(f"the images of `{part}` differ in size ({sizes} ...)", hint="set data.size")
        return Arrays(np.stack(whole), labels)

    def image(self, path: Path) -> np.ndarray:
        """(H, W, C) uint8."""
        from PIL import Image, ImageOps

        with Image.open(path) as opened:
            image = opened.convert("L" if self.grey else "RGB")
        if self.size is not None:
            image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(image.height, image.width, -1)


PLUGIN = Folder
