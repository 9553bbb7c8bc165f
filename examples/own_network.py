"""Distil into a network of your own, with a torch Dataset of your own.

python examples/own_network.py [epochs]
"""

import sys

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset

import edgekd


class Digits(Dataset):
    """Images (1, 8, 8) float32, and their classes."""

    def __init__(self, rows: slice) -> None:
        bunch = load_digits()
        self.images = bunch.images[rows, None].astype(np.float32) / 16
        self.labels = bunch.target[rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.images[index]), int(self.labels[index])


def network(width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)),
    )


epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
torch.manual_seed(0)
train, valid = Digits(slice(0, 1200)), Digits(slice(1200, 1500))
teacher = edgekd.distill(network(32), train=train, valid=valid, epochs=epochs)
student = edgekd.distill(network(8), teacher.network, train=train, valid=valid, epochs=epochs)
print(teacher)
print(student)
