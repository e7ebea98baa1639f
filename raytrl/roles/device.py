"""What this machine can compute in, and what a process took of it. Imports no torch: the driver asks too."""

import platform
import resource
import sys

# Read by vLLM when it is imported; a user's own setting wins.
VLLM_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",  # at every update a warning of each layer without weights
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # engines of one machine would all bind to its first cores
}


def has_cpu_bf16() -> bool:
    """Whether this CPU computes in bfloat16 itself (AVX512-BF16, AMX, or Arm's BF16)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            words = set(info.read().split())
    except FileNotFoundError:  # macOS: Apple silicon computes in bf16
        return platform.machine() == "arm64"
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def peak_memory_gib() -> float:
    """The most memory this process has held so far: of its GPU where it uses one, else resident in RAM."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated() / 2**30)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
