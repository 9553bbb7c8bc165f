"""How models are called in one comparison: images of a call, what the call holds, how calls follow each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from edgekd.core import plugins
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError

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

TIMES = ("min_ms", "p50_ms", "p90_ms", "p90_at_most_ms", "p99_ms", "p99_at_most_ms", "mean_ms")
METRICS = ("top1", "agreement", "delta1", "rmse", "deviation", *TIMES)


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


@dataclass(frozen=True)
class BenchConfig(Settings):
    """What is timed, how much of it, and what is read from it. The first batch and scope make the main table."""

    blocks: int = 90  # rounds; in each, every contestant has one block
    calls: int = 12  # timed calls of a block; few, so that a round is over before the machine changes its speed
    warmup_s: float = 0.5  # at least, for each contestant in each session
    seed: int = 0  # of the order within rounds, and of the intervals
    metrics: tuple[str, ...] = METRICS
    sessions: int = 6  # processes that the rounds are shared out to; fewer where they would have less than 3 each
    batches: tuple[int, ...] = (1,)  # images of a call
    scopes: tuple[Scope, ...] = ("copies",)  # what a call holds: copies, model, preprocessing; cold: starts and memory
    rate: float | None = None  # calls a second that are due, in a further table; latency is from when they were due
    throughput: bool = False  # images a second with several calls under way, in a further table

    def __post_init__(self) -> None:
        if self.blocks < 3:
            raise ConfigError(f"bench.blocks is {self.blocks}", hint="use 3 or more: intervals come from whole blocks")
        if self.calls < 1:
            raise ConfigError(f"bench.calls is {self.calls}", hint="use 1 or more; 12 is usual")
        if self.warmup_s < 0:
            raise ConfigError(f"bench.warmup_s is {self.warmup_s}", hint="use 0 or more seconds; 0.5 is usual")
        if self.sessions < 1:
            raise ConfigError(f"bench.sessions is {self.sessions}", hint="use 1 or more; 6 is usual")
        check(self.batches, self.scopes, self.rate)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"bench.seed is {self.seed}", hint="use a number from 0 to 4294967295")
        total = self.blocks * self.calls
        for name in self.metrics:
            needs = plugins.load("metrics", name).needs
            if total < needs:
                raise ConfigError(
                    f"`{name}` needs {needs} timed calls; bench.blocks x bench.calls is {total}",
                    hint=f"set bench.blocks to {-(-needs // self.calls)}, or take `{name}` out of bench.metrics",
                )
