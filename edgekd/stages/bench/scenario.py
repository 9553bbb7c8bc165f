"""How models are called in one comparison: images of a call, what the call holds, how calls follow each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgekd.core.errors import ConfigError

if TYPE_CHECKING:
    from edgekd.stages.bench.benchmark import BenchConfig

LONG_ROUNDS = 30  # at most, where each block takes long
Scope = Literal["copies", "model", "preprocessing", "cold"]
NAMES: dict[str, str] = {"model": "model only", "preprocessing": "with preprocessing", "cold": "cold start"}
COPIES = {  # that a plain call makes, as the runner calls each runtime
    "onnxruntime": "ONNX Runtime reads the input where it lies and gives out the memory that it wrote to: no copies",
    "openvino": "the input is copied into OpenVINO's memory, the outputs out of it",
    "tensorrt": "the input is copied to pinned memory and to the GPU, the outputs back, and the call waits for them",
}
BOUND = {
    "onnxruntime": "inputs and outputs are bound, and nothing is copied",
    "openvino": "the input lies in OpenVINO's memory already, and the outputs stay there",
    "tensorrt": "the input lies on the GPU already, and the outputs stay there",
}


@dataclass(frozen=True)
class Scenario:
    """One way of calling; its results stand in a table of their own."""

    batch: int = 1  # images of a call
    scope: Scope = "copies"  # what a call holds
    rate: float | None = None  # calls a second that are due, whether or not the last is over; None: one after another
    throughput: bool = False  # several calls under way at once
    main: bool = True  # the table that answers which file to ship, and that gates look at

    @property
    def title(self) -> str:
        """What sets it apart; empty for the main one."""
        if self.main:
            return ""
        words = [f"{self.rate:g} calls a second"] if self.rate else ["throughput"] if self.throughput else []
        words += [NAMES[self.scope]] if self.scope in NAMES else []
        words += [f"batch {self.batch}"] if self.batch > 1 or not words else []
        return ", ".join(words)

    @property
    def slug(self) -> str:
        """The title as a part of a file's name."""
        return self.title.replace(",", "").replace(" ", "-")

    def holds(self, runtime: str) -> str:
        """What a call holds, exactly."""
        images = "one image" if self.batch == 1 else f"{self.batch} images"
        if self.scope == "cold":
            return "a fresh process: loading, compiling, the first call; the file comes from the page cache"
        if self.scope == "model":
            return f"{images} per call, from Python; {BOUND[runtime]}"
        if self.scope == "preprocessing":
            rest = "from uint8 pictures to the class of each and its probability, in NumPy"
            return f"{images} per call, {rest}; {COPIES[runtime]}"
        return f"{images} per call, from Python; {COPIES[runtime]}; no pre- or post-processing"

    def asked(self) -> dict[str, Any]:
        """What a job of the runner says of it."""
        return {"batch": self.batch, "scope": self.scope}

    def rounds(self, config: BenchConfig) -> int:
        """Fewer where a block takes long: a second at a rate, 0.2 s of throughput."""
        return min(config.blocks, LONG_ROUNDS) if self.rate or self.throughput else config.blocks

    def protocol(self, config: BenchConfig) -> dict[str, Any]:
        """What the job's protocol says of it: at a rate, as many calls as are due in a second, or as `config` has."""
        if self.rate:
            calls = -(-config.blocks * config.calls // self.rounds(config))
            return {"rate": self.rate, "calls": max(calls, round(self.rate))}
        return {"throughput": True} if self.throughput else {}


def scenarios(config: BenchConfig) -> tuple[Scenario, ...]:
    """All that a configuration asks for; the main one first."""
    first = config.batches[0]
    found = [Scenario(b, s) for s in config.scopes if s != "cold" for b in config.batches]
    found += [Scenario(scope="cold")] if "cold" in config.scopes else []
    found += [Scenario(first, rate=config.rate)] if config.rate else []
    found += [Scenario(b, throughput=True) for b in config.batches] if config.throughput else []
    return (found[0], *(Scenario(s.batch, s.scope, s.rate, s.throughput, main=False) for s in found[1:]))


def check(batches: Iterable[int], scopes: Iterable[str], rate: float | None) -> None:
    """Raises ConfigError for what cannot be asked for."""
    sizes, held = list(batches), list(scopes)
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ConfigError(f"bench.batches is {sizes}", hint="give images of a call, each once, such as [1, 8]")
    if held[:1] in ([], ["cold"]) or len(set(held)) < len(held):
        hint = "begin with copies, model or preprocessing; add others and cold, each once"
        raise ConfigError(f"bench.scopes is {held}", hint=hint)
    if rate is not None and not 0 < rate < 1e6:
        raise ConfigError(f"bench.rate is {rate}", hint="use calls a second, such as 200")
