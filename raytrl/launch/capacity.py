"""How many trials of a sweep fit side by side."""

from collections.abc import Mapping, Sequence

Bundles = Sequence[Mapping[str, float]]


def trials_that_fit(shared: Bundles, trial: Bundles, nodes: Sequence[Mapping[str, float]], most: int) -> int:
    """Places processes on nodes, the first that has room, until a trial does not fit any more.

    A sum over the cluster would promise trials that no node has room for, and they would wait for one another.

    Args:
        shared: what each process takes that all trials share.
        trial: what each process of one trial takes.
        nodes: what each node has in all.
        most: to stop counting at.

    Returns:
        Trials that have room at the same time; 0 where not even the shared processes and one trial have.
    """
    free = [dict(node) for node in nodes]
    if not all(_place(bundle, free) for bundle in shared):
        return 0
    count = 0
    while count < most and all(_place(bundle, free) for bundle in trial):
        count += 1
    return count


def _place(bundle: Mapping[str, float], free: list[dict[str, float]]) -> bool:
    for node in free:
        if all(node.get(name, 0.0) >= amount - 1e-9 for name, amount in bundle.items()):
            for name, amount in bundle.items():
                node[name] = node.get(name, 0.0) - amount
            return True
    return False
