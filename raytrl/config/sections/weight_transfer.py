"""How new weights get from the learner to the rollout engines: which way a run takes, and whether it can."""

from collections.abc import Mapping
from typing import Any, Literal

from raytrl.config.sections.learner import LearnerSection
from raytrl.config.sections.rollout import RolloutSection


def chosen_transfer(
    rollout: RolloutSection, learner: LearnerSection, lora: Mapping[str, Any] | None
) -> Literal["object_store", "broadcast"]:
    """`rollout.weight_transfer`, where auto is broadcast if it is worth its price: see `RolloutSection`."""
    if rollout.weight_transfer != "auto":
        return rollout.weight_transfer
    # Adapters are small; and when the only engine dies, nobody has the weights and the learner's last checkpoint must do.
    if lora is not None or rollout.actors < 2 or not learner.uses_gpu or transfer_problems(rollout, learner):
        return "object_store"
    return "broadcast"


def transfer_problems(rollout: RolloutSection, learner: LearnerSection) -> list[str]:
    """Why weights cannot go by broadcast here, one line each."""
    where, store = "rollout.weight_transfer: broadcast", "set it to object_store"
    mine, theirs = learner.gpus, rollout.gpus
    if bool(mine) != bool(theirs):
        return [
            f"{where} joins GPUs, or CPUs; found: GPU {mine:g} in learner.resources and {theirs:g} in rollout.resources; "
            f"{store}"
        ]
    if theirs > 1:
        return [
            f"{where} ends in an engine's first process, whose GPU holds only a part of the model; found: GPU {theirs:g} in "
            f"rollout.resources; {store}"
        ]
    if mine % 1 or theirs % 1:
        return [
            f"{where} needs whole GPUs, since NCCL takes each of them once; found: GPU {mine:g} in learner.resources and "
            f"{theirs:g} in rollout.resources; {store}"
        ]
    return []
