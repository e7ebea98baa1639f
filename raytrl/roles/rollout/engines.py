"""The rollout engines by their names in a run file."""

from raytrl.roles.rollout.transformers_engine import TransformersEngine
from raytrl.roles.rollout.vllm.engine import VllmEngine


def engine_class(name: str) -> type[TransformersEngine] | type[VllmEngine]:
    """Of `rollout.engine`, auto replaced; both are made by `from_pretrained` with the same arguments."""
    return VllmEngine if name == "vllm" else TransformersEngine
