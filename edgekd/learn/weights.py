"""Checkpoints in and out: safetensors by choice, torch files only as plain tensors."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.core.errors import CheckpointError, ConfigError

SHOWN = 3  # tensors that an error names
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
    network.load_state_dict(given)


def read(path: Path, trust: bool) -> dict[str, Tensor]:
    """The tensors of a checkpoint, without running anything that it contains unless `trust` says so."""
    if not path.is_file():
        raise ConfigError(f"there is no checkpoint `{path}`", hint="check the path; it counts from the current folder")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"`{path}` is not a safetensors file ({error})", hint="export it anew") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if trust:
            raise unreadable(path, error) from None
        raise CheckpointError(
            f"`{path}` holds more than tensors, and reading it would run code from it",
            hint="save its state_dict() as safetensors, or set `trust: true` if you know where the file comes from",
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise unreadable(path, error) from None
    except (ImportError, AttributeError, TypeError) as error:  # with `trust`, of a class that is gone or changed
        raise CheckpointError(
            f"`{path}` holds objects whose code is not here ({str(error)[:120]})",
            hint="run where that code can be imported, or save the network's state_dict() there as safetensors",
        ) from None
    return unwrapped(content, path)


def unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"`{path}` is not a torch checkpoint ({str(error)[:120]})", hint="export it anew")


def unwrapped(content: Any, path: Path) -> dict[str, Tensor]:
    """The state dict inside of what a training script saved."""
    if isinstance(content, nn.Module):
        return content.state_dict()
    while isinstance(content, dict):
        tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
        inner = next((content[k] for k in WRAPPERS if isinstance(content.get(k), dict)), None)
        if inner is None:
            if tensors:
                return tensors
            break
        content = inner
    raise CheckpointError(
        f"`{path}` holds no state dict", hint=f"save `network.state_dict()`, or wrap it as {WRAPPERS}"
    )
