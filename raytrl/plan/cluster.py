"""What there is and what is asked of it: nodes, groups of equal processes, all that a run needs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from raytrl.config.sections.base import ProcessSection, Strategy
from raytrl.errors import ConfigError

ADDED = "added node "


_CLUSTER_KEYS = ("nodes", "cpus", "gpus", "gpu_gib", "mem_gib")


@dataclass(frozen=True)
class Node:
    """What one node has. `gpu_gib` (of each GPU), `ram_gib` and `labels` are None where nobody knows."""

    name: str
    resources: Mapping[str, float]
    ram_gib: float | None = None
    gpu_gib: float | None = None
    labels: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Group:
    """Equal processes: the run file's key for their number, how many, what each takes, and how they are placed."""

    key: str
    count: int
    resources: Mapping[str, float]
    strategy: Strategy = "pack"
    labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, key: str, count: int, section: ProcessSection) -> "Group":
        """From a section of the run file."""
        return cls(key, count, section.resources, section.placement, section.labels)

    def may_use(self, node: Node) -> bool:
        """Whether its labels let it onto the node, by Ray's selectors: `a`, `!a`, `in(a, b)`, `!in(a, b)`."""
        if node.labels is None:
            return True
        for name, selector in self.labels.items():
            text, negated = selector.removeprefix("!"), selector.startswith("!")
            values = text[3:-1].split(",") if text.startswith("in(") and text.endswith(")") else [text]
            if (node.labels.get(name) in [value.strip() for value in values]) == negated:
                return False
        return True


@dataclass(frozen=True)
class Need:
    """What all processes of a run take; the groups in the order in which they are started."""

    groups: tuple[Group, ...]
    object_store_bytes: int = 512 * 1024**2  # of a local Ray

    @property
    def total(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for group in self.groups:
            for name, amount in group.resources.items():
                total[name] = total.get(name, 0.0) + group.count * amount
        return total

    def __str__(self) -> str:
        return " + ".join(f"{group.key}: {group.count} x {amounts(group.resources)}" for group in self.groups)


@dataclass(frozen=True)
class Cluster:
    """The nodes that a run may use, and what they are called together in messages."""

    nodes: Sequence[Node]
    where: str
    grows: bool = False  # an autoscaler may add nodes, of kinds and up to numbers that Ray does not tell

    def with_added(self, need: Need) -> "Cluster":
        """This cluster with what its autoscaler may add: a node of unknown memory for each process, or for all together."""
        added = []
        for group in need.groups:
            together = group.count if group.strategy == "strict_pack" else 1
            resources = {name: amount * together for name, amount in group.resources.items()}
            added += [
                Node(f"{ADDED}{i + 1} for {group.key}", resources) for i in range(group.count // max(1, together))
            ]
        return replace(self, nodes=[*self.nodes, *added])


def amounts(resources: Mapping[str, float]) -> str:
    """`CPU 1, GPU 1`."""
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


def described_nodes(descriptions: Sequence[str]) -> list[Node]:
    """The nodes of `--cluster nodes=2,gpus=8,gpu_gib=80,cpus=64,mem_gib=512`, one description for each kind of node.

    Raises:
        ConfigError: an unknown key, or a value that is no number.
    """
    nodes: list[Node] = []
    for text in descriptions:
        values: dict[str, float] = {}
        for part in text.split(","):
            key, _, value = part.partition("=")
            try:
                values[key.strip()] = float(value)
            except ValueError:
                values = {}
            if key.strip() not in _CLUSTER_KEYS or values.get(key.strip(), -1) < 0:
                raise ConfigError(
                    f"--cluster: found: {part!r}; expected: {', '.join(_CLUSTER_KEYS)}, each with a number, such as "
                    f"nodes=2,gpus=8,gpu_gib=80,cpus=64,mem_gib=512"
                )
        for _ in range(int(values.get("nodes", 1))):
            resources = {"CPU": values.get("cpus", 0.0), "GPU": values.get("gpus", 0.0)}
            nodes.append(Node(f"node {len(nodes) + 1}", resources, values.get("mem_gib"), values.get("gpu_gib")))
    if not nodes:
        raise ConfigError(f"--cluster: describes no node; found: {' '.join(descriptions)!r}; expected: nodes=1 or more")
    return nodes
