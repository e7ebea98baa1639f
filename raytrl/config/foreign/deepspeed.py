"""`learner.deepspeed`: a DeepSpeed file or dictionary, checked for unknown keys and against `training:`."""

import ast
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytrl.config.foreign.native import (
    DEEPSPEED_SECTIONS,
    ZERO_CLASS,
    NativeClass,
    check_values,
    native_default,
    native_fields,
    package_folder,
    words_for_bools,
)
from raytrl.config.renamed import unknown_key
from raytrl.errors import ConfigError

# Top-level sections that DeepSpeed reads by literal name rather than through runtime/constants.py.
_SECTIONS = """
    zero_optimization activation_checkpointing aio amp autotuning comet comms_logger compile compression_training
    csv_monitor data_efficiency elasticity flops_profiler hybrid_engine pipeline tensorboard tensor_parallel
    timers wandb zenflow zero_allow_untested_optimizer
"""

GATHER = "stage3_gather_16bit_weights_on_model_save"

# DeepSpeed key, `training:` key, what `training:` says by default. transformers fills "auto" from the latter;
# a number in both places must be the same one, or DeepSpeed trains with other settings than the run file shows.
_SHARED = [
    ("train_micro_batch_size_per_gpu", "per_device_train_batch_size"),
    ("gradient_accumulation_steps", "gradient_accumulation_steps"),
    ("gradient_clipping", "max_grad_norm"),
    ("bf16.enabled", "bf16"),
    ("fp16.enabled", "fp16"),
    ("optimizer.params.lr", "learning_rate"),
    ("optimizer.params.weight_decay", "weight_decay"),
    ("scheduler.params.warmup_max_lr", "learning_rate"),
    ("scheduler.params.warmup_num_steps", "warmup_steps"),
]

_EXAMPLES = {
    "bf16": "{enabled: auto}",
    "fp16": "{enabled: auto}",
    "offload_optimizer": "{device: cpu}",
    "offload_param": "{device: cpu}",
}

_OWNED_BY_PPO = {
    "train_batch_size": "ppo.batch_size",
    "train_micro_batch_size_per_gpu": "ppo.max_tokens_per_microbatch",
    "gradient_accumulation_steps": "ppo.minibatches and ppo.max_tokens_per_microbatch",
    "gradient_clipping": "ppo.max_grad_norm",
    "optimizer": "ppo.learning_rate and ppo.adam_epsilon",
    "scheduler": "ppo.lr_schedule",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
}


@functools.cache
def _top_level_keys() -> frozenset[str]:
    module = ast.parse((package_folder("deepspeed") / "runtime/constants.py").read_text(encoding="utf-8"))
    named = {
        node.value.value
        for node in module.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        and node.value.value.isidentifier()
    }
    return frozenset(named | set(_SECTIONS.split()))


def read_deepspeed(value: str | dict[str, Any], where: str = "learner.deepspeed") -> dict[str, Any]:
    """The DeepSpeed dictionary, read from its file where a path is given.

    Raises:
        ConfigError: no such file, or it is not a JSON object.
    """
    if isinstance(value, dict):
        return dict(value)
    path = Path(value)
    if not path.is_file():
        raise ConfigError(f"{where}: no such file; found: {value!r}; expected: a DeepSpeed JSON file or its keys")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: {path}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: {path}: not a text file in UTF-8: {error.reason}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: {path}: found: {type(found).__name__}; expected: one JSON object")
    return found


def for_trainer(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """The dictionary as TRL's trainer gets it.

    DeepSpeed wants a batch size even where the trainer has one; under ZeRO-3 whole weights are gathered when they are saved.
    """
    deepspeed = {"train_micro_batch_size_per_gpu": "auto"} | deepspeed
    zero = deepspeed.get("zero_optimization", {})
    return deepspeed if zero.get("stage") != 3 else {**deepspeed, "zero_optimization": {**zero, GATHER: True}}


def zero_stage(deepspeed: Mapping[str, Any] | None) -> int | None:
    """The ZeRO stage (0 to 3), or None without DeepSpeed."""
    if deepspeed is None:
        return None
    zero = deepspeed.get("zero_optimization")
    stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
    return stage if isinstance(stage, int) else 0  # anything else is a problem that check_deepspeed reports


def check_deepspeed(deepspeed: dict[str, Any], training: dict[str, Any], native: Any, workers: int) -> list[str]:
    """Problems of the dictionary itself and of its agreement with `training:` and `workers`, one line each."""
    problems = check_keys(deepspeed) + _conflicts(deepspeed, training, native)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    rows, accumulated = (training.get(name, native_default(native, name)) for name in names)
    found, expected = deepspeed.get("train_batch_size", "auto"), rows * accumulated * workers
    if found not in ("auto", expected):
        problems.append(
            f"learner.deepspeed.train_batch_size: is {found!r}, but training.{names[0]} {rows} x training.{names[1]} "
            f'{accumulated} x learner.workers {workers} = {expected}; write "auto" there, or that number'
        )
    return problems


def check_for_ppo(deepspeed: dict[str, Any]) -> list[str]:
    """Problems of the dictionary itself and of what PPO sets on its own, one line each."""
    where, problems = "learner.deepspeed", check_keys(deepspeed)
    if zero_stage(deepspeed) == 0:
        problems.append(
            f"{where}.zero_optimization.stage: is 0, which is plain data parallelism; expected: 1, 2 or 3, or no "
            f"learner.deepspeed"
        )
    for key, owner in _OWNED_BY_PPO.items():
        if (value := without_auto(deepspeed).get(key)) not in (None, {}, {"enabled": False}):
            problems.append(f'{where}.{key}: found: {value!r}; is set by {owner}; leave it out, or write "auto"')
    return problems


def without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """The dictionary without "auto" values, which only transformers' trainers fill in."""
    kept = {}
    for key, value in settings.items():
        inner = without_auto(value) if isinstance(value, dict) else value
        if inner != "auto" and not (isinstance(value, dict) and value and not inner):
            kept[key] = inner
    return kept


def check_keys(deepspeed: dict[str, Any]) -> list[str]:
    """Unknown keys and values that cannot be, one line each."""
    where = "learner.deepspeed"
    problems = [unknown_key(where, key, _top_level_keys()) for key in deepspeed if key not in _top_level_keys()]
    problems += words_for_bools(f"{where}.", deepspeed)
    for key, section in deepspeed.items():
        if isinstance(section, dict) and key not in ("zero_optimization", *DEEPSPEED_SECTIONS):
            problems += words_for_bools(f"{where}.{key}.", section)
    zero = deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [*problems, f"{where}.zero_optimization: found: {zero!r}; expected: a dictionary"]
    fields = native_fields(ZERO_CLASS)
    # DeepSpeed keeps old spellings as aliases that its field table does not show.
    known = set(fields) | {"stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"}
    known |= {f"stage3_{name}" for name in fields}
    problems += [unknown_key(f"{where}.zero_optimization", key, known) for key in zero if key not in known]
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        problems.append(f"{where}.zero_optimization.stage: found: {stage!r}; expected: 0, 1, 2 or 3")
    if stage == 3 and zero.get(GATHER) is False:
        problems.append(
            f"{where}.zero_optimization.{GATHER}: found: false; expected: true, or leave it out: checkpoints and model/ hold "
            f"whole weights"
        )
    problems += _wrong_values(f"{where}.zero_optimization", ZERO_CLASS, zero)
    for name, section_class in DEEPSPEED_SECTIONS.items():
        parent, _, key = name.rpartition(".")
        section = (zero if parent else deepspeed).get(key)
        if isinstance(section, dict):
            known = set(native_fields(section_class))
            problems += [unknown_key(f"{where}.{name}", k, known) for k in section if k not in known]
            problems += _wrong_values(f"{where}.{name}", section_class, section)
        elif section is not None:
            problems.append(f"{where}.{name}: found: {section!r}; expected: a dictionary, such as {_EXAMPLES[key]}")
    return problems


def _wrong_values(where: str, native: NativeClass, section: dict[str, Any]) -> list[str]:
    plain = {key: value for key, value in section.items() if value != "auto" and not isinstance(value, dict)}
    return check_values(where, native, plain)


def _conflicts(deepspeed: dict[str, Any], training: dict[str, Any], native: Any) -> list[str]:
    problems = []
    for theirs, ours in _SHARED:
        value: Any = deepspeed
        for part in theirs.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None or value == "auto":
            continue
        said = ours in training
        expected = training[ours] if said else native_default(native, ours)
        # bf16 left to its default follows the device; only a contradiction that was written down is one.
        if (value != expected and said) or (value != expected and ours not in ("bf16", "fp16")):
            origin = f"training.{ours} is {expected!r}" + ("" if said else f" (default of {native.name})")
            problems.append(
                f'learner.deepspeed.{theirs}: is {value!r}, but {origin}; write "auto" there, or the same value in both'
            )
    return problems
