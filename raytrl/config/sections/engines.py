"""Which rollout engine a run takes, and whether that engine can do what the run file asks. Imports neither engine."""

import ast
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raytrl.config.foreign.native import NativeClass, check_values, native_fields, package_folder
from raytrl.config.renamed import unknown_key
from raytrl.config.sections.rollout import RolloutSection
from raytrl.errors import ConfigError

VLLM_ARGS = NativeClass("vllm", "engine/arg_utils.py", "EngineArgs")
# What raytrl sets itself, and by which key.
_OWNED = {
    "model": "model.path",
    "tokenizer": "model.tokenizer",
    "dtype": "model.dtype",
    "trust_remote_code": "model.trust_remote_code",
    "seed": "seed (every response has a seed of its own)",
    "logprobs_mode": "raytrl: log-probs are those of the distribution that was sampled from",
    "enable_lora": "lora (the adapter is merged on the rollout side, or several are held with ppo.max_lag)",
    "max_loras": "rollout.versions",
    "max_cpu_loras": "rollout.versions",
    "max_lora_rank": "lora.r",
    "skip_tokenizer_init": "raytrl, which tokenizes itself",
    "data_parallel_size": "rollout.actors",
    "distributed_executor_backend": "rollout.resources (one process, or one a GPU)",
    "worker_extension_cls": "raytrl",
}
# What vLLM does not serve as an adapter, and the initial weights that leave the base as it is.
_NOT_ADAPTERS = ("use_dora", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_bdlora", "use_qalora")
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_MAX_ADAPTER_RANK = 512
_CPU_BLOCK = 128  # tokens of a block of vLLM's key-value cache on a CPU
CPU_SEQUENCES = 128  # in vLLM's batch on CPUs at a time, unless engine_args.max_num_seqs says otherwise
_INSTALL = "pip install 'raytrl[vllm]' on GPUs; on CPUs see README.md"


def vllm_is_installed() -> bool:
    """Whether `import vllm` would find a package: vLLM's own, or its CPU build."""
    return importlib.util.find_spec("vllm") is not None


def vllm_computes_on_cpus() -> bool:
    """Whether the installed build does, by vLLM's own signs of it; one for GPUs takes the first GPU that it finds."""
    if sys.platform == "darwin" or os.environ.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # the build for CPUs has a name of its own
        return True


@dataclass(frozen=True)
class Asked:
    """What a run wants of its engine."""

    rollout: RolloutSection
    model_paths: Sequence[str]
    lora: Mapping[str, Any] | None = None
    logprobs: bool = False  # of responses that another model sampled
    elsewhere: bool = False  # on machines that are not this one: raytrl's image for GPUs has vLLM

    @property
    def has_vllm(self) -> bool:
        """Whether vLLM is where the run will be."""
        return self.rollout.engine == "vllm" or self.rollout.uses_gpu if self.elsewhere else vllm_is_installed()


def chosen_engine(asked: Asked) -> Literal["vllm", "transformers"]:
    """`rollout.engine`, where auto is vllm if it is installed and can run this model."""
    if asked.rollout.engine != "auto":
        return asked.rollout.engine
    return "transformers" if vllm_obstacles(asked) else "vllm"


def engine_problems(asked: Asked) -> list[str]:
    """Why `rollout.engine` cannot serve as it is asked to, one line each."""
    if chosen_engine(asked) != "vllm":
        gpus = asked.rollout.gpus
        is_certain = asked.rollout.engine == "transformers" or asked.has_vllm  # else the cluster may have vLLM
        if gpus > 1 and is_certain:
            return [
                f"rollout.resources.GPU: a transformers engine computes on one GPU; found: {gpus:g}; expected: at most 1, and "
                f"more rollout.actors, or rollout.engine: vllm, which spreads a model over several"
            ]
        return []
    if obstacles := vllm_obstacles(asked):
        return [f"rollout.engine: vllm cannot be taken: {obstacle}" for obstacle in obstacles]
    return _argument_problems(asked.rollout) + _placement_problems(asked.rollout)


def holds_several_versions(asked: Asked) -> bool | None:
    """Whether the engine that is taken can hold versions of the policy side by side; None: that cannot be told here.

    vLLM only holds adapters: of models whose class says so, and without what it refuses (`PEFTHelper`).
    """
    if chosen_engine(asked) == "transformers":
        return True
    if asked.lora is None or any(asked.lora.get(key) for key in _NOT_ADAPTERS):
        return False
    ranks = [asked.lora.get("r") or 8, *(asked.lora.get("rank_pattern") or {}).values()]
    init = asked.lora.get("init_lora_weights")
    if max(ranks) > _MAX_ADAPTER_RANK or (isinstance(init, str) and init.lower() not in _PLAIN_INITS):
        return False
    found = [_serves_adapters(path) for path in asked.model_paths]
    return None if None in found else all(found)


def _serves_adapters(model_path: str) -> bool | None:
    """Whether vLLM's class for this model takes adapters, from its source; None where there is no telling."""
    try:
        (architecture,) = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))["architectures"]
        models = package_folder("vllm") / "model_executor/models"
        registry = ast.parse((models / "registry.py").read_text(encoding="utf-8"))
        (known,) = [
            ast.literal_eval(node.value)
            for node in registry.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_TEXT_GENERATION_MODELS"
        ]
        module, name = known[architecture]
        return _inherits(models, module, name, "SupportsLoRA")
    except (ConfigError, OSError, ValueError, KeyError, TypeError):
        return None


def _inherits(folder: Path, module: str, name: str, wanted: str) -> bool:
    """Whether a class of a module in this folder is below the wanted one, through modules beside it."""
    body = ast.parse((folder / f"{module}.py").read_text(encoding="utf-8")).body
    beside = {
        alias.asname or alias.name: (node.module.rpartition(".")[2], alias.name)
        for node in body
        if isinstance(node, ast.ImportFrom) and node.module is not None
        if node.level == 1 or node.module.startswith("vllm.model_executor.models.")
        for alias in node.names
    }
    classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    if name not in classes:
        return False
    for base in map(ast.unparse, classes[name].bases):
        if base == wanted:
            return True
        place, known_as = beside.get(base, (module, base))
        if (folder / f"{place}.py").is_file() and _inherits(folder, place, known_as, wanted):
            return True
    return False


def engine_words(asked: Asked) -> str:
    """The engine's name, and why it is not vLLM where that is installed; for people."""
    if asked.rollout.engine == "vllm" or not asked.has_vllm:
        return str(asked.rollout.engine)
    obstacles = vllm_obstacles(asked)
    return f"{asked.rollout.engine} (not vllm: {obstacles[0]})" if obstacles else str(asked.rollout.engine)


def vllm_obstacles(asked: Asked) -> list[str]:
    """What keeps vLLM from running these models."""
    if not asked.has_vllm:
        return [f"it is not installed; {_INSTALL}; or set rollout.engine: transformers"]
    obstacles = []
    if asked.lora is not None and asked.lora.get("use_dora"):
        obstacles.append("lora.use_dora: its magnitudes are not merged on the rollout side; set engine: transformers")
    if asked.logprobs and asked.rollout.sampling.temperature != 1.0:
        obstacles.append(
            f"its log-probabilities of given responses (reference.path) are those of temperature 1; found: "
            f"{asked.rollout.sampling.temperature:g}; set engine: transformers"
        )
    if not asked.rollout.uses_gpu:
        if not asked.elsewhere and not vllm_computes_on_cpus():
            obstacles.append(
                f"this build computes on GPUs alone, and would take one that rollout.resources does not ask for; found: vllm "
                f"{importlib.metadata.version('vllm')}; ask for a GPU, or set engine: transformers"
            )
        sizes = _cpu_head_sizes()
        for path in asked.model_paths:
            size = _head_size(path)
            if sizes and size is not None and size not in sizes:
                obstacles.append(
                    f"its attention on CPUs has no heads of that size; found: {size} in {path!r}; expected: one of "
                    f"{', '.join(map(str, sizes))}; set engine: transformers"
                )
    return obstacles


def _argument_problems(rollout: RolloutSection) -> list[str]:
    where, given = "rollout.engine_args", rollout.engine_args
    problems = [f"{where}.{key}: is set by {_OWNED[key]}" for key in given if key in _OWNED]
    if given.get("enforce_eager") is False and not rollout.uses_gpu:
        problems.append(
            f"{where}.enforce_eager: code that vLLM compiled for a CPU may keep old weights; found: false; leave it out"
        )
    if not vllm_is_installed():  # and so its names are not known here
        return problems
    known = native_fields(VLLM_ARGS)
    problems += [unknown_key(where, key, known.keys() - _OWNED.keys()) for key in given if key not in known]
    return problems + check_values(where, VLLM_ARGS, dict(given))


def _placement_problems(rollout: RolloutSection) -> list[str]:
    """An engine is one actor; the GPUs of its bundle, which lie on one node, are the GPUs that it spreads over."""
    gpus = rollout.gpus
    asked = gpus_asked(rollout.engine_args)
    if not gpus and (asked or 1) > 1:
        return [
            f"rollout.engine_args: an engine on CPUs is one process; found: tensor and pipeline parallel sizes of {asked} "
            f"in all; expected: 1; use more rollout.actors"
        ]
    if gpus > 1 and gpus != int(gpus):
        return [f"rollout.resources.GPU: found: {gpus:g}; expected: a whole number, or a part of one GPU"]
    if gpus and asked is not None and asked != max(1, gpus):
        return [
            f"rollout.resources.GPU: an engine spreads over as many GPUs as its actor has; found: {gpus:g} and "
            f"rollout.engine_args with parallel sizes of {asked} in all; expected: the same number (without a size in "
            f"engine_args, tensor_parallel_size is the number of GPUs)"
        ]
    return []


def cpu_batch_tokens(rollout: RolloutSection, length: int) -> int:
    """Tokens that vLLM takes in at once on a CPU: its own number, and at least a whole sequence, which it never splits there.

    `engine_args.max_num_batched_tokens`, where that is given.

    Args:
        length: tokens of a sequence at most.
    """
    sequences = rollout.engine_args.get("max_num_seqs") or CPU_SEQUENCES
    return int(rollout.engine_args.get("max_num_batched_tokens") or max(2048, length, sequences))


def cpu_cache_bytes(rollout: RolloutSection, token_bytes: int, length: int) -> int:
    """vLLM's key-value cache on a CPU, where its own choice would be most of the machine.

    `engine_args.kv_cache_memory_bytes`, or what a full batch needs: at most a GiB, at least one sequence.

    Args:
        token_bytes: keys and values of one token in all layers.
        length: tokens of a sequence at most.
    """
    if given := rollout.engine_args.get("kv_cache_memory_bytes"):
        return int(given)
    sequence_bytes = token_bytes * _CPU_BLOCK * -(-length // _CPU_BLOCK)
    sequences = rollout.engine_args.get("max_num_seqs") or CPU_SEQUENCES
    spare = 2 * token_bytes * _CPU_BLOCK  # vLLM keeps a block to itself
    return spare + max(sequence_bytes, min(sequences * sequence_bytes, 2**30))


def gpus_asked(engine_args: Mapping[str, Any]) -> int | None:
    """The product of the parallel sizes that are given; None where none is."""
    sizes = [engine_args[key] for key in ("tensor_parallel_size", "pipeline_parallel_size") if key in engine_args]
    if not sizes or not all(isinstance(size, int) for size in sizes):
        return None
    product = 1
    for size in sizes:
        product *= size
    return product


def _head_size(model_path: str) -> int | None:
    """Of a local model; None where it cannot be told without the hub."""
    try:
        config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        if config.get("head_dim"):
            return int(config["head_dim"])
        width = config.get("hidden_size") or config["n_embd"]
        return int(width) // int(config.get("num_attention_heads") or config["n_head"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cpu_head_sizes() -> list[int]:
    """What vLLM's CPU attention was compiled for, from its source; empty where that reads otherwise."""
    if not vllm_is_installed():
        return []
    file = package_folder("vllm") / "v1/attention/backends/cpu_attn.py"
    if not file.is_file():
        return []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "get_supported_head_sizes":
            returned = node.body[-1]
            if isinstance(returned, ast.Return) and isinstance(returned.value, ast.List):
                return [int(size) for size in ast.literal_eval(returned.value)]
    return []
