"""Checkpoints in and out: safetensors by choice, torch files only as plain tensors."""

from __future__ import annotations

import mmap
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import CheckpointError, ConfigError
from edgekd.utils.external import foreign

SHOWN = 3  # tensors that an error names
DEEPEST = 4  # wrappers around a state dict
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")  # keys under which others put a state dict


def save(network: nn.Module, path: Path) -> None:
    """Write the state dict as safetensors. Tied weights are written twice: the format has no shared memory."""
    from safetensors import torch as safetensors

    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in network.state_dict().items()}
    path.write_bytes(safetensors.save(tensors))


def load(network: nn.Module, path: Path, trust: bool = False) -> None:
    """Fill `network` from a checkpoint. Raises CheckpointError if it does not fit in every tensor."""
    given, wanted = read(path, trust), network.state_dict()
    if not any(k.startswith("module.") for k in wanted):  # else it is the network's own name, not DataParallel's
        given = {k.removeprefix("module."): v for k, v in given.items()}
    problems = [f"lacks `{k}`" for k in wanted if k not in given]
    problems += [f"has `{k}`, which the network has not" for k in given if k not in wanted]
    problems += [f"`{k}` is no plain tensor of real numbers" for k in wanted if k in given and not plain(given[k])]
    problems += [
        f"`{k}` is {tuple(given[k].shape)}, the network's is {tuple(wanted[k].shape)}"
        for k in wanted
        if k in given and given[k].shape != wanted[k].shape
    ]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"checkpoint `{path}` does not fit the network: {'; '.join(problems[:SHOWN])}{more}",
            hint="check depth, width and the number of classes of the network that it was made with",
        )
    with foreign(f"the tensors of `{path}` cannot be read", "export it anew", CheckpointError):
        network.load_state_dict(given)


def plain(tensor: Tensor) -> bool:
    odd = tensor.is_quantized or tensor.is_meta or tensor.is_nested or tensor.is_complex()
    return tensor.layout == torch.strided and not odd


def read(path: Path, trust: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without running anything that it contains unless `trust` says so."""
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint `{path}`", hint="check the path; it counts from the current folder")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with foreign(f"`{path}` is not a safetensors file", "export it anew", CheckpointError):
            return load_file(path)
    with foreign(f"`{path}` is not a torch checkpoint", "export it anew", CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of archives of TorchScript: whatever they are, the words below say it
        if not trust:
            check_claims(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=not trust)
        except pickle.UnpicklingError as error:
            raise error if trust else refused(path, error) from None
        except (ImportError, AttributeError, TypeError) as error:
            if not trust:
                raise
            raise CheckpointError(  # of a class that is gone or changed
                f"`{path}` holds objects whose code is not here ({str(error)[:120]})",
                hint="run where that code can be imported, or save the network's state_dict() there as safetensors",
            ) from None
    return unwrapped(content, path)


def check_claims(path: Path) -> None:
    """Raises CheckpointError for what torch allocates, though it runs nothing: parts that unpack, bytes of any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type for part in archive.infolist()):
                raise CheckpointError(f"`{path}` is compressed, as torch writes nothing", hint="export it anew")
    if path.stat().st_size:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if re.search(rb"c(builtins|__builtin__)\nbytearray\n", content):
                raise refused(path, pickle.UnpicklingError("GLOBAL builtins.bytearray"))


def refused(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """What a pickle wanted beyond tensors: the function or class that it names, where torch says so."""
    named = re.search(r"GLOBAL (\S{1,120})", str(error))
    wanted = f" (it asks for `{named[1]}`)" if named else ""
    return CheckpointError(
        f"`{path}` holds more than tensors{wanted}, and reading it would run code from it",
        hint="save its state_dict() as safetensors, or set `trust: true` if you know where the file comes from",
    )


def unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside of what a training script saved."""
    if isinstance(content, nn.Module):
        return content.state_dict()
    for _ in range(DEEPEST):  # one may hold itself
        if not isinstance(content, dict):
            break
        inner = next((content[k] for k in WRAPPERS if isinstance(content.get(k), dict)), None)
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
        if inner is None and tensors:
            return tensors
        content = inner
    raise CheckpointError(
        f"`{path}` holds no state dict", hint=f"save `network.state_dict()`, or wrap it as {WRAPPERS}"
    )
