"""The algorithms by name: each is a set of defaults of `ppo`'s keys, any of which can be written beside it.

Sources, and what implementations differ in: GRPO arXiv 2402.03300, with TRL's defaults (the paper's mean is
`loss_mean: responses`); Dr. GRPO 2503.20783; DAPO 2503.14476; GSPO 2507.18071; CISPO 2506.13585; RLOO 2402.14740;
REINFORCE++ and its baseline 2501.03262.
"""

from collections.abc import Mapping
from typing import Any, Literal

Algorithm = Literal["ppo", "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce", "reinforce_baseline"]

# One optimizer step a batch, at TRL's learning rate and Adam's own epsilon; no KL penalty, so no reference is loaded.
_GRPO: dict[str, Any] = {
    "advantage": "group_mean",
    "advantage_scale": "group",
    "whiten_advantages": False,
    "kl": {"place": "loss", "coef": 0.0},
    "responses_per_prompt": 8,
    "epochs": 1,
    "minibatches": 1,
    "learning_rate": 1.0e-6,
    "adam_epsilon": 1.0e-8,
}
_REINFORCE: dict[str, Any] = _GRPO | {
    "advantage": "none",
    "advantage_scale": "none",
    "whiten_advantages": True,
    "kl": {"place": "reward", "coef": 0.01},
    "responses_per_prompt": 1,
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "ppo": {},
    "grpo": _GRPO,
    "dr_grpo": _GRPO | {"advantage_scale": "none", "loss_mean": "max_tokens"},
    "dapo": _GRPO | {"clip_range_high": 0.28, "responses_per_prompt": 16, "train_unfinished": False},
    "gspo": _GRPO
    | {
        "ratio": "sequence",
        "loss_mean": "responses",
        "clip_range": 3.0e-4,
        "clip_range_high": 4.0e-4,
        "minibatches": 4,
    },
    "cispo": _GRPO | {"loss": "cispo", "ratio_limit": 5.0, "minibatches": 4},
    "rloo": _GRPO
    | {
        "advantage": "leave_one_out",
        "advantage_scale": "none",
        "loss_mean": "max_tokens",
        "kl": {"place": "reward", "coef": 0.05},
        "responses_per_prompt": 2,
    },
    "reinforce": _REINFORCE,
    "reinforce_baseline": _REINFORCE | {"advantage": "group_mean", "responses_per_prompt": 8},
}


def defaults_of(algorithm: object) -> dict[str, Any]:
    """Dotted keys below `ppo` with the values that an algorithm gives them; none for an unknown one."""
    found: dict[str, Any] = {}
    for key, value in PRESETS.get(str(algorithm), {}).items():
        found |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return found
