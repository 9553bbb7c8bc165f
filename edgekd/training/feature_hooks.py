"""Read and replace the outputs of inner layers of any module, without changing its code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from edgekd.core.plugins import unknown_name
from edgekd.errors import ConfigError


class FeatureExtractor:
    """Call a model and also get the outputs of some of its layers, by dotted path."""

    def __init__(self, model: nn.Module, *layers: str, role: str = "") -> None:
        """Raise ConfigError if the model has no such layer; `role` is teacher or student, for the message."""
        modules = dict(model.named_modules())
        for name in layers:
            if name not in modules:
                kind = type(model).__name__
                whose = f"the {role} ({kind})" if role else kind
                raise unknown_name(f"{whose} has no layer `{name}`", name, [n for n in modules if n])
        self.model = model
        self.layers = {name: modules[name] for name in layers}

    def __call__(self, x: Tensor, inject: Mapping[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the model's output, and the outputs of the layers.

        The model goes on from `inject[layer]` instead of that layer's output, so gradients of what follows
        reach the injected tensor and not the layers before it.
        """
        features: dict[str, Tensor] = {}
        inject = inject or {}

        def hook(name: str) -> Any:
            def tap(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
                if name in features:
                    raise ConfigError(f"layer `{name}` runs twice in one pass", hint="tap a layer that runs once")
                features[name] = output
                # a copy goes on: an activation in place after this layer would change what was seen
                return inject.get(name, output).clone()

            return tap

        hooks = [layer.register_forward_hook(hook(name)) for name, layer in self.layers.items()]
        try:
            return self.model(x), features
        finally:
            for handle in hooks:
                handle.remove()
