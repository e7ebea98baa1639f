"""Gives back the places of learners whose trial was stopped."""

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group


def free_left_places() -> int:
    """Removes placement groups of this job whose maker, an actor, is dead; returns how many.

    Ray keeps them until the job ends. Ray Train has a helper that removes those of a controller that died, but it asks the
    dashboard, which a local Ray does not have: the next trials would wait for places that nobody uses.
    """
    from ray._private.state import state  # the public table does not name the maker
    from ray.core.generated import gcs_pb2

    job, data, found = ray.get_runtime_context().get_job_id(), gcs_pb2.PlacementGroupTableData, 0
    for packed in state._connect_and_get_accessor().get_placement_group_table():
        group = data.FromString(packed)
        is_mine = group.creator_job_id.hex() == job and not group.is_detached
        is_left = group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil()
        if is_mine and is_left and group.state != data.REMOVED:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            found += 1
    return found
