"""Distil a network into a smaller one, export it, quantize it, and compare the three files: a minute on a laptop.

python examples/quickstart.py [epochs]
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from sklearn.datasets import load_digits

import edgekd

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
torch.manual_seed(0)

# any arrays: images (N, C, H, W) as the networks take them, and class numbers
bunch = load_digits()
images = (bunch.images[:, None] / 16 - 0.3).astype(np.float32).repeat(2, 2).repeat(2, 3)
train, test = (images[:1300], bunch.target[:1300]), (images[1300:], bunch.target[1300:])

# any networks: here two of edgekd's
teacher = edgekd.models.ResNet(depth=14, width=16).build(10, 1)
student = edgekd.models.ResNet(depth=8, width=8).build(10, 1)

teacher = edgekd.distill(teacher, train=train, epochs=epochs).network  # without a teacher: training on labels
distilled = edgekd.distill(student, teacher, train=train, method=edgekd.methods.KD(temperature=4), epochs=epochs)
print(distilled)

with TemporaryDirectory() as folder:
    big = edgekd.export(teacher, Path(folder, "teacher.onnx"), images=train[0])
    fp32 = edgekd.export(distilled, Path(folder, "student.onnx"), images=train[0])
    int8 = edgekd.quantize(fp32, Path(folder, "student.int8.onnx"), calibration=train[0][:256], target="cpu")
    # smoke: a few calls only; leave it out for numbers that mean something
    print(edgekd.benchmark([big, fp32, int8], images=test[0], labels=test[1], smoke=True))
