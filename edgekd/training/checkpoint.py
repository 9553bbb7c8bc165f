"""Read and write checkpoints: safetensors by default, torch files only as plain tensors."""

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
from edgekd.utils.external import external_code

SHOWN = 3  # tensors that an error names
DEEPEST = 4  # wrappers around a state dict
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")  # keys under which others put a state dict


def save(network: nn.Module, path: Path) -> None:
    """Write the state dict as safetensors. Tied weights are written twice: the format has no shared memory."""
    from safetensors import torch as safetensors

    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in network.state_dict().items()}
    path.write_bytes(safetensors.save(tensors))


def load(network: nn.Module, path: Path, allow_pickle: bool = False) -> None:
    """Load a checkpoint into `network`. Raise CheckpointError unless every tensor fits."""
    tensors, expected = read(path, allow_pickle), network.state_dict()
    if not any(
        k.startswith("module.") for k in expected
    ):  # else the prefix belongs to the network, not to DataParallel
        tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    problems = [f"lacks `{k}`" for k in expected if k not in tensors]
    problems += [f"has `{k}`, which the network lacks" for k in tensors if k not in expected]
    problems += [
        f"`{k}` is no plain tensor of real numbers" for k in expected if k in tensors and not is_plain(tensors[k])
    ]
    problems += [
        f"`{k}` is {tuple(tensors[k].shape)}, the network's is {tuple(expected[k].shape)}"
        for k in expected
        if k in tensors and tensors[k].shape != expected[k].shape
    ]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(
            f"checkpoint `{path}` does not fit the network: {'; '.join(problems[:SHOWN])}{more}",
            hint="check depth, width and number of classes of the network that was trained",
        )
    with external_code(f"the tensors of `{path}` cannot be read", "export it again", CheckpointError):
        network.load_state_dict(tensors)


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is strided, real and has data."""
    special = tensor.is_quantized or tensor.is_meta or tensor.is_nested or tensor.is_complex()
    return tensor.layout == torch.strided and not special


def read(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, without running anything that it contains unless `allow_pickle`."""
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint `{path}`", hint="check the path; it counts from the current folder")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        with external_code(f"`{path}` is not a safetensors file", "export it again", CheckpointError):
            return load_file(path)
    with (
        external_code(f"`{path}` is not a torch checkpoint", "export it again", CheckpointError),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of TorchScript archives: the errors below report them
        if not allow_pickle:
            check_claims(path)
        try:
            content = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        except pickle.UnpicklingError as error:
            raise error if allow_pickle else pickle_error(path, error) from None
        except (ImportError, AttributeError, TypeError) as error:
            if not allow_pickle:
                raise
            raise CheckpointError(  # of a class that is gone or changed
                f"`{path}` holds objects whose code cannot be imported ({str(error)[:120]})",
                hint="run where the code can be imported, or save the network's state_dict() there as safetensors",
            ) from None
    return unwrap_state_dict(content, path)


def check_claims(path: Path) -> None:
    """Raise CheckpointError for what torch allocates, though it runs nothing: parts that unpack, bytes of any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type for part in archive.infolist()):
                raise CheckpointError(f"`{path}` is compressed, as torch writes nothing", hint="export it again")
    if path.stat().st_size:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if re.search(rb"c(builtins|__builtin__)\nbytearray\n", content):
                raise pickle_error(path, pickle.UnpicklingError("GLOBAL builtins.bytearray"))


def pickle_error(path: Path, error: pickle.UnpicklingError) -> CheckpointError:
    """Return the error for a pickle with more than tensors, with the function or class that it names."""
    match = re.search(r"GLOBAL (\S{1,120})", str(error))
    wanted = f" (it asks for `{match[1]}`)" if match else ""
    return CheckpointError(
        f"`{path}` holds more than tensors{wanted}, and reading it would run code from it",
        hint="save its state_dict() as safetensors, or set `allow_pickle: true` if you trust the source of the file",
    )


def unwrap_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict inside of what a training script saved."""
    if isinstance(content, nn.Module):
        return content.state_dict()
    for _ in range(DEEPEST):  # a dict may contain itself
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
