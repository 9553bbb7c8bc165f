"""How models are called in one comparison: images of a call, what the call includes, how calls follow each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from edgekd.core import plugins
from edgekd.core.settings import Settings
from edgekd.errors import ConfigError

LONG_ROUNDS = 30  # at most, where each round takes long
Scope = Literal["end_to_end", "inference_only", "with_preprocessing", "cold_start"]
TITLES: dict[str, str] = {
    "inference_only": "inference only",
    "with_preprocessing": "with preprocessing",
    "cold_start": "cold start",
}
COPIES = {  # that an end-to-end call includes, as the runner calls each runtime
    "onnxruntime": "ONNX Runtime reads the input in place and returns the memory that it wrote to: no copies",
    "openvino": "the input is copied into OpenVINO's memory, the outputs out of it",
    "tensorrt": "the input is copied to pinned memory and to the GPU, the outputs back, and the call waits for them",
}
BOUND = {
    "onnxruntime": "inputs and outputs are bound, and nothing is copied",
    "openvino": "the input is in OpenVINO's memory already, and the outputs stay there",
    "tensorrt": "the input is on the GPU already, and the outputs stay there",
}

TIMES = ("min_ms", "p50_ms", "p90_ms", "p90_upper_ms", "p99_ms", "p99_upper_ms", "mean_ms")


@dataclass(frozen=True)
class Scenario:
    """One way of calling; its results are in a table of their own."""

    batch: int = 1
    """Images of a call."""
    scope: Scope = "end_to_end"
    """What a call includes."""
    rate: float | None = None
    """Calls a second that are due, whether or not the last is over; None: one after another."""
    throughput: bool = False
    """Several calls are under way at once."""
    main: bool = True
    """Its table decides which file is selected, and gates look at it."""

    @property
    def title(self) -> str:
        """How it differs from the main one; empty for that."""
        if self.main:
            return ""
        parts = [f"{self.rate:g} calls a second"] if self.rate else ["throughput"] if self.throughput else []
        parts += [TITLES[self.scope]] if self.scope in TITLES else []
        parts += [f"batch {self.batch}"] if self.batch > 1 or not parts else []
        return ", ".join(parts)

    @property
    def slug(self) -> str:
        """The title as a part of a file's name."""
        return self.title.replace(",", "").replace(" ", "-")

    def describe_call(self, runtime: str) -> str:
        """Return exactly what a call includes."""
        images = "one image" if self.batch == 1 else f"{self.batch} images"
        if self.scope == "cold_start":
            return "a fresh process: loading, compiling, the first call; the file comes from the page cache"
        if self.scope == "inference_only":
            return f"{images} per call, from Python; {BOUND[runtime]}"
        if self.scope == "with_preprocessing":
            work = "from uint8 pictures to the class of each and its probability, in NumPy"
            return f"{images} per call, {work}; {COPIES[runtime]}"
        return f"{images} per call, from Python; {COPIES[runtime]}; no pre- or post-processing"

    def rounds(self, config: BenchConfig) -> int:
        """Return the number of rounds: fewer where one takes long (a second at a rate, 0.2 s of throughput)."""
        return min(config.rounds, LONG_ROUNDS) if self.rate or self.throughput else config.rounds

    def calls_per_round(self, config: BenchConfig) -> int:
        """Return the calls of a round: at a rate, as many as are due in a second, or as many in all as usual."""
        if not self.rate:
            return config.calls_per_round
        return max(-(-config.rounds * config.calls_per_round // self.rounds(config)), round(self.rate))


def scenarios(config: BenchConfig) -> tuple[Scenario, ...]:
    """Return all scenarios that a configuration asks for, the main one first."""
    timed = [Scenario(batch, scope) for scope in config.scopes if scope != "cold_start" for batch in config.batches]
    cold = [Scenario(scope="cold_start")] if "cold_start" in config.scopes else []
    at_rate = [Scenario(config.batches[0], rate=config.rate)] if config.rate else []
    throughput = [Scenario(batch, throughput=True) for batch in config.batches] if config.throughput else []
    main, *others = [*timed, *cold, *at_rate, *throughput]
    return (main, *(replace(scenario, main=False) for scenario in others))


def check(batches: Iterable[int], scopes: Iterable[str], rate: float | None) -> None:
    """Raise ConfigError for scenarios that make no sense."""
    sizes, names = list(batches), list(scopes)
    if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ConfigError(f"bench.batches is {sizes}", hint="give images of a call, each once, such as [1, 8]")
    if names[:1] in ([], ["cold_start"]) or len(set(names)) < len(names):
        raise ConfigError(
            f"bench.scopes is {names}",
            hint="begin with end_to_end, inference_only or with_preprocessing; add others and cold_start, each once",
        )
    if rate is not None and not 0 < rate < 1e6:
        raise ConfigError(f"bench.rate is {rate}", hint="use calls a second, such as 200")


def task_metrics() -> tuple[str, ...]:
    """Return the names of the metrics of all tasks; a comparison has those of its own."""
    return tuple(
        name for name, module in plugins.modules("metrics").items() if module in plugins.modules("tasks").values()
    )


@dataclass(frozen=True)
class BenchConfig(Settings):
    """What is timed, how much of it, and which metrics are computed. The first batch and scope make the main table."""

    rounds: int = 90
    """In each round, every entry has one block of calls."""
    calls_per_round: int = 12
    """Timed calls of each entry; few, so that a round is over before the machine changes its speed."""
    warmup_s: float = 0.5
    """At least, for each entry in each process."""
    seed: int = 0
    """Of the order within rounds, and of the intervals."""
    metrics: tuple[str, ...] = field(default_factory=lambda: (*task_metrics(), *TIMES))
    processes: int = 6
    """The rounds are divided among them; fewer where each would have less than 3."""
    batches: tuple[int, ...] = (1,)
    """Images of a call."""
    scopes: tuple[Scope, ...] = ("end_to_end",)
    """What a call includes: end_to_end, inference_only, with_preprocessing; cold_start: start-up time and memory."""
    rate: float | None = None
    """Calls a second that are due, in a further table; latency is from when they were due."""
    throughput: bool = False
    """Images a second with several calls under way, in a further table."""

    def __post_init__(self) -> None:
        if self.rounds < 3:
            raise ConfigError(f"bench.rounds is {self.rounds}", hint="use 3 or more: intervals come from whole rounds")
        if self.calls_per_round < 1:
            raise ConfigError(f"bench.calls_per_round is {self.calls_per_round}", hint="use 1 or more; 12 is usual")
        if self.warmup_s < 0:
            raise ConfigError(f"bench.warmup_s is {self.warmup_s}", hint="use 0 or more seconds; 0.5 is usual")
        if self.processes < 1:
            raise ConfigError(f"bench.processes is {self.processes}", hint="use 1 or more; 6 is usual")
        check(self.batches, self.scopes, self.rate)
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"bench.seed is {self.seed}", hint="use a number from 0 to 4294967295")
        total = self.rounds * self.calls_per_round
        for name in self.metrics:
            min_calls = plugins.load("metrics", name).min_calls
            if total < min_calls:
                raise ConfigError(
                    f"`{name}` needs {min_calls} timed calls; bench.rounds x bench.calls_per_round is {total}",
                    hint=f"set bench.rounds to {-(-min_calls // self.calls_per_round)}, or remove `{name}` from "
                    "bench.metrics",
                )
