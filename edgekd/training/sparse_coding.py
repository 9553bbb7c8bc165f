"""A layer that encodes features by a few atoms of a dictionary (Tran, Gabbouj, Iosifidis, 2021, arXiv 2103.17012)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXELS = 4096  # that the scale of the atoms is fitted to
FITS = 4  # iterations: scale and codes depend on each other


class SparseLayer(nn.Module):
    """Similarities of (N, C, H, W) features to the atoms of a dictionary, which also decodes sparse codes."""

    def __init__(self, channels: int, num_atoms: int, num_active: int) -> None:
        super().__init__()
        self.num_active = num_active
        self.atoms = nn.Parameter(torch.empty(channels, num_atoms))
        self.bias = nn.Parameter(torch.empty(1))
        self.unit: Tensor
        self.register_buffer("unit", torch.ones(()))  # scale of the features, by which they are divided
        nn.init.kaiming_uniform_(self.atoms)
        nn.init.uniform_(self.bias, -1.0, 1.0)

    @torch.no_grad()
    def init_atoms(self, pixels: Tensor) -> None:
        """Draw the atoms from shuffled features (P, C), and scale them to decode best.

        A tenth of the random ones stays, because pixels may be equal.
        """
        channels, count = self.atoms.shape
        self.unit.copy_(pixels.square().mean().sqrt().clamp(min=1e-6) * channels**0.25)
        self.atoms.mul_(0.1)
        drawn = F.normalize(pixels[:count], dim=1).t()
        self.atoms[:, : drawn.shape[1]] += drawn
        x = pixels[:PIXELS, :, None, None]
        for _ in range(FITS):
            decoded = self.decode(self.codes(self(x)))
            self.atoms.mul_((x * decoded).sum() / decoded.square().sum().clamp(min=1e-12))

    def forward(self, x: Tensor) -> Tensor:
        """Return similarities (N, K, H, W) before the sigmoid, in float32: bfloat16 makes the largest ones equal."""
        with torch.autocast(x.device.type, enabled=False):
            kernel = self.atoms.t()[:, :, None, None]
            return F.conv2d(x.to(kernel.dtype) / self.unit, kernel, self.bias.expand(len(kernel)))

    def codes(self, similarities: Tensor) -> Tensor:
        """Return k_s of similarities before the sigmoid; of equal ones more than s may be kept."""
        least = similarities.topk(self.num_active, dim=1).values[:, -1:]
        return torch.where(similarities >= least, similarities.sigmoid(), 0.0)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the features of codes (N, K, H, W): (N, C, H, W)."""
        with torch.autocast(codes.device.type, enabled=False):
            return F.conv2d(codes, self.atoms[:, :, None, None]) * self.unit

    def gap(self, x: Tensor) -> Tensor:
        """Return MSE(x, x^), summed over channels, of features divided by `unit`."""
        return ((x - self.decode(self.codes(self(x)))) / self.unit).square().sum(1).mean()
