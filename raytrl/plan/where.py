"""Where a run would be: on a local Ray or in a cluster, and what each of them refuses."""

import os

from raytrl.config.runs.base import Run
from raytrl.errors import ConfigError, ResourceError

THIS_MACHINE = "this machine"


def ray_address() -> str | None:
    """The cluster that RAY_ADDRESS names; None where it is not set, blank or `local`, Ray's word for a Ray of one's own.

    Raises:
        ResourceError: it is the address of a job server.
    """
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if address.startswith(("http://", "https://")):
        raise ResourceError(
            f"RAY_ADDRESS: is the address of a job server, which a run cannot join; found: {address!r}; expected: host:port "
            f"of a running head, or not set; what a job server is given goes through: raytrl submit"
        )
    return None if address in ("", "local") else address


def joins_cluster(run: Run) -> bool:
    """Whether the run joins a Ray that exists: `cluster.address` says so, or it runs inside a Ray job.

    Raises:
        ResourceError: RAY_ADDRESS, which would count, cannot be joined.
    """
    return run.cluster.address is not None or ray_address() is not None


def refuse_client(run: Run) -> None:
    """Refuses a sweep from outside of the cluster: Ray Tune moves itself there, away from what watches it here.

    Raises:
        ResourceError: the address is `ray://…`.
    """
    if (run.cluster.address or "").startswith("ray://"):
        raise ResourceError(
            f"cluster.address: Ray Tune would run in a process of the cluster, where nothing of this sweep is watched; "
            f"found: {run.cluster.address!r}; expected: raytrl submit -- tune …, or host:port on one of its nodes"
        )


def check_one_node(run: Run) -> None:
    """Refuses placement that a local Ray, one node without labels, could never give.

    Raises:
        ResourceError: naming the key.
    """
    for each in run.processes():
        role, section = each.section_name, each.section
        if section.labels:
            raise ResourceError(
                f"{role}.labels: a local Ray is one node without labels; found: {section.labels}; expected: "
                f"cluster.address or a Ray job, or no labels"
            )
        if section.placement == "strict_spread" and each.most > 1:
            raise ResourceError(
                f"{role}.placement: strict_spread puts each process on a node of its own; found: {each.most} processes and "
                f"a local Ray, which is one node; expected: cluster.address or a Ray job, or spread"
            )


def refuse_lost_output(output_dir: str) -> None:
    """Refuses a run directory inside the job's copy of the working directory, which Ray deletes after the job.

    Raises:
        ConfigError: the path is relative.
    """
    if "://" not in output_dir and not os.path.isabs(os.path.expanduser(output_dir)):
        raise ConfigError(
            f"output_dir: would be lost: a job runs in a copy of the working directory that Ray deletes afterwards; found: "
            f"{output_dir!r}; expected: a path on storage that all nodes see, or a URI; add output_dir=/shared/runs"
        )
