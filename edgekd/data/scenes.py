"""Rendered rooms with spheres, and the depth of every pixel: a regression that needs no download.

Each image is ray-cast from its own seed: a camera above a chequered floor, a back wall, spheres, one light, noise.
The target is the distance to the camera's plane in metres, as depth cameras give it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgekd.core.augment import Augment
from edgekd.core.dataset import Dataset, DatasetSplits, SplitArrays
from edgekd.errors import ConfigError
from edgekd.utils.progress import progress_bar

FOCAL = 1.1  # in image widths
FAR = 8.0  # metres, at most: the back wall
HIDDEN = 0.02  # share of pixels that have no depth, as a sensor's dropouts


@dataclass(frozen=True)
class Scenes(Dataset):
    height: int = 48
    width: int = 64
    train: int = 1200
    valid: int = 200
    test: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) < 8:
                raise ConfigError(f"data.{name} is {getattr(self, name)}", hint="use 8 pixels or more")
        for name in ("train", "valid", "test"):
            if getattr(self, name) < 2:
                raise ConfigError(f"data.{name} is {getattr(self, name)}", hint="use 2 images or more")

    @property
    def task(self) -> str:
        return "regression"

    @property
    def augment(self) -> Augment:
        return Augment()

    def read(self, limit: int | None) -> DatasetSplits:
        counts = [min(n, limit or n) for n in (self.train, self.valid, self.test)]
        splits = []
        with progress_bar("render", sum(counts)) as advance:
            for part, count in enumerate(counts):
                images = np.empty((count, self.height, self.width, 3), np.uint8)
                depths = np.empty((count, 1, self.height, self.width), np.float32)
                for number in range(count):
                    random = np.random.default_rng((self.seed, part, number))
                    images[number], depths[number, 0] = scene(random, self.height, self.width)
                    advance()
                splits.append(SplitArrays(images, depths))
        train, valid, test = splits
        return DatasetSplits(train, valid, test, classes=("depth",))


def scene(random: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 and (H, W) float32 in metres, NaN where the sensor saw nothing."""
    rays = directions(random, height, width)  # (H, W, 3), of length 1 along the optical axis: t is the depth
    camera = random.uniform(1.0, 1.8)  # metres above the floor
    wall = random.uniform(5.0, FAR)
    t = np.full((height, width), wall)
    normal = np.broadcast_to([0.0, 0.0, -1.0], rays.shape).copy()
    colour = np.broadcast_to(random.uniform(0.3, 0.9, 3), rays.shape).copy()
    with np.errstate(divide="ignore"):
        floor = np.where(rays[..., 1] > 0, camera / rays[..., 1], np.inf)  # y points down
    hit = floor < t
    t[hit] = floor[hit]
    normal[hit] = (0.0, -1.0, 0.0)
    tiles = random.uniform(0.4, 1.0)
    ground = rays * t[..., None] / tiles
    dark, bright = random.uniform(0.1, 0.5, 3), random.uniform(0.4, 1.0, 3)
    chequer = (np.floor(ground[..., 0]) + np.floor(ground[..., 2])) % 2 == 0
    colour[hit] = np.where(chequer[hit][:, None], dark, bright)
    for _ in range(random.integers(2, 6)):
        radius = random.uniform(0.2, 0.7)
        place = np.array([random.uniform(-2, 2), camera - radius, random.uniform(1.5, wall - radius)])
        near = sphere(rays, place, radius)
        hit = near < t
        t[hit] = near[hit]
        normal[hit] = (rays[hit] * near[hit][:, None] - place) / radius
        colour[hit] = random.uniform(0.1, 1.0, 3)
    light = np.array([random.uniform(-1, 1), -1.5, random.uniform(-1.5, 0)])
    shade = 0.35 + 0.65 * np.clip(normal @ (light / np.linalg.norm(light)), 0, 1)
    image = 255 * colour * shade[..., None] + random.normal(0, 4, rays.shape)
    depth = np.where(random.random(t.shape) < HIDDEN, np.nan, t)
    return image.clip(0, 255).astype(np.uint8), depth.astype(np.float32)


def directions(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return the ray of every pixel, (H, W, 3): x right, y down, z forward with length 1; the camera is tilted down."""
    rows, columns = np.mgrid[0:height, 0:width]
    x, y = (columns + 0.5 - width / 2) / (FOCAL * width), (rows + 0.5 - height / 2) / (FOCAL * width)
    tilt = random.uniform(0.0, 0.3)  # radians
    forward, down = np.cos(tilt) - y * np.sin(tilt), np.sin(tilt) + y * np.cos(tilt)
    return np.stack([x / forward, down / forward, np.ones_like(x)], -1)


def sphere(rays: np.ndarray, place: np.ndarray, radius: float) -> np.ndarray:
    """Return the depth at which each ray meets a sphere, infinite where it does not."""
    a, b = (rays**2).sum(-1), rays @ place
    inside = b**2 - a * (place @ place - radius**2)
    with np.errstate(invalid="ignore"):
        t = (b - np.sqrt(inside)) / a
    return np.where((inside > 0) & (t > 0), t, np.inf)


PLUGIN = Scenes
