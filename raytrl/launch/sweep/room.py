"""How many trials of a sweep run side by side: their processes find places, and the memory of their nodes holds them."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from raytrl.config.load import LoadedRun
from raytrl.config.runs.base import Run
from raytrl.config.runs.sweep import TuneRun
from raytrl.config.trials import Edge, trial_run
from raytrl.errors import ConfigError, ResourceError
from raytrl.plan.capacity import CERTAINTY, Load, Room, check_memory, loads
from raytrl.plan.cluster import Cluster, Group, Need, Node, amounts
from raytrl.plan.config_shapes import ModelShape
from raytrl.plan.fit import Chosen
from raytrl.plan.memory import GIB, Estimate, estimates
from raytrl.plan.need import need_of
from raytrl.plan.placement import Placement, place_trials
from raytrl.plan.shapes import read_shapes

# A trial's own process (0.35), Ray Train's controller (0.24) and three helpers (0.11 each), and the board (0.06): what each
# had for itself in a PPO run, measured on Linux.
TRIAL_GIB = 1.0


@dataclass(frozen=True)
class Sweep:
    """A sweep that has been checked."""

    run: TuneRun
    base: LoadedRun
    chosen: Chosen = field(default_factory=dict)  # resources that nobody wrote, of every trial

    @property
    def shares_reward(self) -> bool:
        """Whether one set of reward actors serves all trials: nothing of the reward is searched."""
        has_reward = any(each.role == "reward" for each in self.base.run.processes())
        return has_reward and not any(key.startswith("reward.") for key in self.run.search)

    def shared_need(self) -> Need:
        groups = [Group.of(each) for each in self.base.run.processes() if each.role == "reward"]
        return Need(tuple(groups) if self.shares_reward else ())

    def trial_need(self, loaded: LoadedRun) -> Need:
        return need_of(loaded.run, reward_shared=self.shares_reward)


@dataclass(frozen=True)
class Memory:
    """What the processes of the largest trial take, by key of the run file; worked out once for all trials."""

    run: Run
    shapes: Mapping[str, ModelShape]
    found: Mapping[str, Estimate]
    notes: Sequence[str] = ()  # what could not be estimated


@dataclass(frozen=True)
class AtOnce:
    """How many trials run side by side, in words for people, and what they should know besides."""

    count: int
    words: str
    memory: str
    notes: Sequence[str] = ()


def largest_memory(sweep: Sweep, edges: Sequence[Edge]) -> Memory:
    """The memory of a trial with that value of each searched key that takes the most."""
    run, base = sweep.run, _memory(sweep.base)
    most: dict[str, tuple[float, object]] = {}
    alone = [base]
    for edge in edges:
        if isinstance(edge.value, float):
            continue  # a rate or a coefficient; sizes are whole numbers, names or switches
        alone.append(_memory(edge.loaded))
        size = _total(alone[-1])
        if size > max(_total(base), most.get(edge.key, (0.0, None))[0]):
            most[edge.key] = size, edge.value
    if len(most) > 1:
        with suppress(ConfigError):  # these may not go together: then no trial has them all
            alone.append(_memory(trial_run(run, {key: value for key, (_, value) in most.items()}, "edge", "runs")))
    return max(alone, key=_total)


def _memory(loaded: LoadedRun) -> Memory:
    shapes, problems = read_shapes(loaded.run)
    notes = [f"memory is not estimated: {problem}" for problem in problems]
    return Memory(loaded.run, shapes, estimates(loaded.run, shapes), notes)


def _total(memory: Memory) -> float:
    return sum(estimate.total + estimate.host for estimate in memory.found.values())


def concurrent_trials(sweep: Sweep, edges: Sequence[Edge], cluster: Cluster) -> AtOnce:
    """How many trials run side by side.

    Raises:
        ResourceError: not even one fits, or not as many as `max_concurrent` asks for.
    """
    run, shared, where = sweep.run, sweep.shared_need(), cluster.where
    largest = [sweep.trial_need(loaded) for loaded in [sweep.base, *(edge.loaded for edge in edges)]]
    wanted = run.num_trials if run.max_concurrent == "auto" else min(run.max_concurrent, run.num_trials)
    least = 1 if run.max_concurrent == "auto" else wanted
    notes, there = list[str](), cluster
    placements, need = _fewest(shared, largest, there, wanted)
    if len(placements) - 1 < least and cluster.grows:
        there = cluster.with_added(Need((*shared.groups, *(replace(g, count=least * g.count) for g in need.groups))))
        placements, need = _fewest(shared, largest, there, least)
        notes.append(
            f"no room yet for {least} at once: the autoscaler of {where} has to add nodes, and trials wait for them"
        )
    fits = len(placements) - 1
    if fits < least:
        has = ", ".join(f"{sum(node.resources.get(name, 0) for node in there.nodes):g} {name}" for name in need.total)
        beside = f" beside what all trials share ({shared})" if shared.groups else ""
        if fits < 1:
            raise ResourceError(f"one trial ({need}) does not fit{beside}; found: {has} on {where}")
        raise ResourceError(
            f"max_concurrent: {wanted} trials do not fit, {fits} do; each takes {need}{beside}; found: {has} on {where}"
        )
    memory = largest_memory(sweep, edges)
    # One alone is judged as any other run is: on its GPUs too, and with the setting that would make it fit.
    alone = Need((*shared.groups, *need.groups))
    _, tight = check_memory(memory.run, Room.on(there, alone), memory.shapes)
    needs = [shared, *[need] * fits]
    notes += [*memory.notes, *tight]
    return _in_memory(sweep, memory, list(zip(needs, placements, strict=True)), there.nodes, notes)


def _fewest(shared: Need, trials: Sequence[Need], cluster: Cluster, most: int) -> tuple[list[Placement], Need]:
    """Places for as many of the trial that the fewest have room of, and that trial's need."""
    each = [(place_trials(shared, need, cluster.nodes, most), need) for need in trials]
    return min(each, key=lambda pair: len(pair[0]))


def _in_memory(
    sweep: Sweep,
    memory: Memory,
    placed: Sequence[tuple[Need, Placement]],
    nodes: Sequence[Node],
    notes: Sequence[str],
) -> AtOnce:
    """As many of the placed trials as the nodes' RAM holds; `auto` keeps to what the estimate says fits."""
    asked, trial = sweep.run.max_concurrent, Group("trial", 1, {})
    own = [placed[0]]
    for need, placement in placed[1:]:
        home = next(iter(next(iter(placement.places.values()))))
        own.append((Need((*need.groups, trial)), Placement({**placement.places, trial.key: {home: 1}})))
    found = {**memory.found, trial.key: Estimate({"libraries": TRIAL_GIB * GIB})}

    def tightest(count: int) -> Load:
        each = [load for load in loads(own[: count + 1], nodes, found) if load.there]
        return max(each, key=lambda load: load.share, default=Load("RAM", 0.0, None))

    most = len(placed) - 1
    # Where one alone is tight already, more that are no tighter, on other nodes say, are as good.
    allowed = max(1.0, tightest(1).share) if asked == "auto" else CERTAINTY
    count = next((n for n in range(most, 1, -1) if tightest(n).share <= allowed), 1)
    load, full = tightest(count), tightest(most)
    if count < most:
        text = f"{most} trials at once take about {full.taken:.1f} GiB of {full.what}; found: {full.there or 0:.1f} GiB"
        if asked != "auto":
            raise ResourceError(f"max_concurrent: memory: {text}; would fit by this estimate: max_concurrent={count}")
        notes = [*notes, f"memory: {text}; so {count} at once, where there are places for {most}"]
    elif load.is_tight:
        notes = [*notes, f"memory is tight: {load}, and the estimate may be off by a quarter"]
    return AtOnce(count, _places(sweep, count), f"about {load}", list(dict.fromkeys(notes)))


def _places(sweep: Sweep, count: int) -> str:
    total = sweep.trial_need(sweep.base).total
    shared = sweep.shared_need().total
    beside = f" beside {amounts(shared)} of reward actors that all share" if shared else ""
    return f"{count} trial{'s' if count > 1 else ''} of {amounts(total)} each{beside}"
