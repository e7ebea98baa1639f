"""What the CPU of this machine can compute in. Imports no torch: the driver asks too, before anything starts."""

import platform

from raytrl.config.eval_run import EvalRun
from raytrl.config.runs import SupervisedRun, TrainingRun
from raytrl.errors import ConfigError


def check_cpu(run: TrainingRun | EvalRun) -> None:
    """Refuses bf16 where the CPU would only emulate it.

    Raises:
        ConfigError: naming the key.
    """
    training = run.training if isinstance(run, SupervisedRun) else {}
    key = next((k for k in ("bf16", "bf16_full_eval") if training.get(k)), None)
    key = f"training.{key}" if key else "model.dtype" if run.model.dtype == "bfloat16" else None
    if key is not None and not has_cpu_bf16():
        raise ConfigError(
            f"{key}: this CPU ({platform.processor() or platform.machine()}) has no bf16 arithmetic; "
            f"found: bf16 on workers without GPU; expected: float32 (leave {key} out)"
        )


def has_cpu_bf16() -> bool:
    """Whether this CPU computes in bfloat16 itself (AVX512-BF16, AMX, or Arm's BF16)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            words = set(info.read().split())
    except FileNotFoundError:  # macOS: Apple silicon computes in bf16
        return platform.machine() == "arm64"
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
