"""What a run shows in Ray's metrics: gauges that Ray's dashboard and Prometheus read as `ray_raytrl_…`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

from ray.util.metrics import Gauge

from raytrl.config.runs.base import TrainingRun
from raytrl.records.metrics import ALL_PHASES, KL, LENGTH, LOSS, NUM_TOKENS, SCORE, STEP_S, time_of
from raytrl.records.progress import Progress

# name → what it means, and the tags beside `run`. Ray puts `ray_` before each name.
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "raytrl_step": ("optimizer or PPO steps done", ()),
    "raytrl_total_steps": ("steps the run will do", ()),
    "raytrl_step_seconds": ("wall-clock seconds of the last step", ()),
    "raytrl_phase_seconds": ("seconds of the last step by phase, as in time/<phase>_s of metrics.jsonl", ("phase",)),
    "raytrl_tokens_per_second": ("tokens learned from (SFT, reward, DPO) or sampled (PPO), all workers", ()),
    "raytrl_loss": ("loss of the last step", ()),
    "raytrl_score": ("mean reward of the last batch, before any penalty", ()),
    "raytrl_kl": ("mean KL to the reference, nats a response", ()),
    "raytrl_requests_waiting": ("requests of one learner worker that its actors have not answered", ("role",)),
    "raytrl_restarts": ("since this start: learner group restarts, and actors lost", ("role",)),
}
# gauge → key of metrics.jsonl
_FROM_METRICS = {
    "raytrl_step_seconds": STEP_S,
    "raytrl_loss": LOSS,
    "raytrl_score": SCORE,
    "raytrl_kl": KL,
}


class Gauges:
    """The gauges of one run in this process; needs a Ray that runs."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Gauge] = {}

    def set(self, name: str, value: float, **tags: str) -> None:
        """
        Raises:
            KeyError: no such gauge in GAUGES.
        """
        text, keys = GAUGES[name]
        if name not in self._gauges:
            self._gauges[name] = Gauge(name, description=text, tag_keys=("run", *keys))
        self._gauges[name].set(value, tags={"run": self._run, **tags})


class StepGauges:
    """Keeps a run's gauges at what its worker 0 last told the driver."""

    def __init__(self, run: str, batch_size: int | None) -> None:
        """
        Args:
            batch_size: PPO's responses a step; None for the other kinds, whose trainers count tokens.
        """
        self._gauges, self._batch_size = Gauges(run), batch_size
        self._starts = 0
        self._tokens: tuple[int, float] | None = None  # step, and tokens up to it

    def take(self, event: Progress) -> None:
        """Of any kind; most change nothing."""
        match event.kind:
            case "start":
                self._gauges.set("raytrl_restarts", self._starts, role="learner")
                self._starts += 1
                self._tokens = None
                self._set_step(event)
            case "step":
                self._set_step(event)
                self._take_metrics(event.step, event.metrics)
            case "plan" | "phase" | "notice" | "eval" | "checkpoint" | "beat" | "failure" | "earlier":
                pass
            case _:
                assert_never(event.kind)

    def _set_step(self, event: Progress) -> None:
        self._gauges.set("raytrl_step", event.step)
        self._gauges.set("raytrl_total_steps", event.total_steps)

    def _take_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, key in _FROM_METRICS.items():
            if key in metrics:
                self._gauges.set(name, metrics[key])
        for phase in ALL_PHASES:
            if time_of(phase) in metrics:
                self._gauges.set("raytrl_phase_seconds", metrics[time_of(phase)], phase=phase)
        seconds = metrics.get(STEP_S, 0.0)
        tokens = self._tokens_a_step(step, metrics)
        if tokens is not None and seconds > 0:
            self._gauges.set("raytrl_tokens_per_second", tokens / seconds)

    def _tokens_a_step(self, step: int, metrics: Mapping[str, float]) -> float | None:
        if self._batch_size is not None:
            return self._batch_size * metrics[LENGTH] if LENGTH in metrics else None
        if NUM_TOKENS not in metrics:
            return None
        before, self._tokens = self._tokens, (step, metrics[NUM_TOKENS])
        return (metrics[NUM_TOKENS] - before[1]) / (step - before[0]) if before and step > before[0] else None


class RoleGauges:
    """How the pools of one role look from one learner worker, all together."""

    def __init__(self, run: str, role: str) -> None:
        self._gauges, self._role = Gauges(run), role
        self._waiting: dict[int, int] = {}
        self._restarts: dict[int, int] = {}

    def part(self, counts_losses: bool = True) -> "PoolGauges":
        """Of a further pool; `counts_losses`: of actors that no other pool of the role has."""
        number = len(self._waiting)
        self._waiting[number] = self._restarts[number] = 0
        return PoolGauges(self, number, counts_losses)

    def waiting(self, requests: int, part: int = 0) -> None:
        self._waiting[part] = requests
        self._gauges.set("raytrl_requests_waiting", sum(self._waiting.values()), role=self._role)

    def restarts(self, count: int, part: int = 0) -> None:
        self._restarts[part] = count
        self._gauges.set("raytrl_restarts", sum(self._restarts.values()), role=self._role)


@dataclass(frozen=True)
class PoolGauges:
    """What one pool adds to its role's."""

    role: RoleGauges
    number: int
    counts_losses: bool

    def waiting(self, requests: int) -> None:
        self.role.waiting(requests, self.number)

    def restarts(self, count: int) -> None:
        if self.counts_losses:
            self.role.restarts(count, self.number)


def step_gauges(run: TrainingRun) -> StepGauges:
    """For a run of any kind that trains."""
    return StepGauges(run.name, run.responses_a_step)
