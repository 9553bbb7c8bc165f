"""Training on all cores beside busy neighbours, by threads that spin while they wait and by threads that soon sleep.

    python benchmarks/spinning.py [--turns 5]

A ResNet-20 learns from noise in a process of its own for some seconds, on as many threads as there are cores, alone
and beside processes that keep a core busy each. GOMP_SPINCOUNT is libgomp's default, then what edgekd sets. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack

SPINS = {"libgomp's default": "300000", "edgekd's": "1000"}
SECONDS = 4.0
BATCH = 64
TRAIN = f"""
import time
from edgekd import _environment

_environment.prepare()
import torch
from edgekd.models.resnet import PLUGIN as ResNet

net = ResNet(depth=20, width=16).build(10, 3).to(memory_format=torch.channels_last)
x, y = torch.randn({BATCH}, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, ({BATCH},))
optimiser = torch.optim.SGD(net.parameters(), 0.01)

def step():
    optimiser.zero_grad()
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimiser.step()

step()
started, steps = time.perf_counter(), 0
while time.perf_counter() - started < {SECONDS}:
    step()
    steps += 1
print({BATCH} * steps / (time.perf_counter() - started))
"""


def images_per_second(spin: str, neighbours: int) -> float:
    with ExitStack() as stack:
        for _ in range(neighbours):
            busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(busy.kill)
        told = subprocess.check_output([sys.executable, "-c", TRAIN], env=os.environ | {"GOMP_SPINCOUNT": spin})
    return float(told)


def shown(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    turns = parser.parse_args().turns
    print(f"| busy neighbours | {' | '.join(f'{name}, images/s' for name in SPINS)} | ratio |")
    print("| --- | --- | --- | --- |")
    for neighbours in range((os.cpu_count() or 1) + 1):
        seen = [[images_per_second(spin, neighbours) for spin in SPINS.values()] for _ in range(turns)]
        rates = " | ".join(shown(list(column), 0) for column in zip(*seen, strict=True))
        print(f"| {neighbours} | {rates} | {shown([own / usual for usual, own in seen], 2)} |", flush=True)


if __name__ == "__main__":
    main()
