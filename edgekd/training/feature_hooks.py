"""Read and replace the outputs of inner layers of any module, without changing its code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from edgekd.core.plugins import unknown
from edgekd.errors import ConfigError


class Taps:
    """Call a model and also get the outputs of some of its layers, by dotted path."""

    def __init__(self, model: nn.Module, *layers: str, role: str = "") -> None:
        """Raises ConfigError if the model has no such layer; it is called by its `role` in a lesson, if it has one."""
        modules = dict(model.named_modules())
        for name in layers:
            if name not in modules:
                kind = type(model).__name__
                whose = f"the {role} ({kind})" if role else kind
                raise unknown(f"{whose} has no layer `{name}`", name, [n for n in modules if n])
        self.model = model
        self.layers = {name: modules[name] for name in layers}

    def __call__(self, x: Tensor, inject: Mapping[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The model's output, and what each tapped layer made of its own input.

        The model goes on from `inject[layer]` instead of that layer's output, so gradients of what follows
        reach the injected tensor and not the layers before it.
        """
        seen: dict[str, Tensor] = {}
        inject = inject or {}

        def hook(name: str) -> Any:
            def tap(_module: nn.Module, _args: Any, made: Tensor) -> Tensor:
                if name in seen:
                    raise ConfigError(f"layer `{name}` runs twice in one pass", hint="tap a layer that runs once")
                seen[name] = made
                # a copy goes on: an activation in place after this layer would change what was seen
                return inject.get(name, made).clone()

            return tap

        hooks = [layer.register_forward_hook(hook(name)) for name, layer in self.layers.items()]
        try:
            return self.model(x), seen
        finally:
            for handle in hooks:
                handle.remove()
