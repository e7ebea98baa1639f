"""How much memory each process of a run takes at its peak, estimated from the shapes of its models.

The sums follow the code that allocates: TRL's trainers, DeepSpeed's ZeRO stages (Rajbhandari et al. 2020, section 3),
raytrl's own learner and rollout engine. Held against measured peaks on a CPU by tests/benchmarks/plan_memory.py.
Sequences are taken to be as long as the run file allows; shorter ones take less.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from raytrl.config.foreign.deepspeed import zero_stage
from raytrl.config.runs.base import Run
from raytrl.config.runs.benchmark import BenchmarkRun
from raytrl.config.runs.pairs import PairsRun
from raytrl.config.runs.ppo import PpoRun
from raytrl.config.runs.rollout import RolloutRun
from raytrl.config.runs.serve import ServeRun
from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.sections.engines import cpu_batch_tokens, cpu_cache_bytes
from raytrl.config.sections.ppo import HEAD_CHUNK, LOGIT_BYTES, activation_bytes
from raytrl.config.sections.serve import BATCH_PROMPT_TOKENS, BATCH_ROWS
from raytrl.plan.config_shapes import ModelShape
from raytrl.plan.shapes import lora_parameters

_CONVERSATION_BYTES = 4.0 * 2**20  # of a copy that has run a small tool: 2.8 MiB of its own
# Resident memory of a process that has loaded its libraries and no model yet, measured on Linux (GiB).
LIBRARIES_GIB = {
    "supervised": 0.65,
    "peft": 0.75,
    "learner": 0.65,
    "rollout": 0.5,
    "vllm": 0.65,
    "reward": 0.5,
    "benchmark": 0.9,
    "function": 0.25,
}
# On a GPU: the CUDA context, NCCL and what the allocator cannot use. Not measured here: the usual size.
CUDA_GIB = 1.0
MIB = 2**20
GIB = 2**30
# TRL scores tokens and vocabulary in tiles of this size (trl/kernels/chunked_logprob.py), with these float32 copies.
_TILE = (4096, 32768)
_TILE_COPIES = 4
_REQUEST_TOKENS = 512  # of a benchmark's question or a pair's text, which nobody has counted: most are shorter
_SCORED_TOKENS = 32 * _REQUEST_TOKENS  # of a batch of texts that a reward model scores
_UNKNOWN_LENGTH = 4096
_GPU_BATCH_TOKENS = 16384  # of a forward pass: vLLM's default, on the largest GPUs


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process by what they are for: on its GPU where it has one, else resident in RAM.

    `host` is what a process with a GPU takes of RAM besides. `share` is the part of its GPU that vLLM takes whole: what
    its weights and activations leave of it becomes key-value cache. `mapped`, of `parts`, are pages of a file that
    processes of one node share: frozen weights in the dtype that their file has.
    """

    parts: Mapping[str, float]
    host: float = 0.0
    share: float = 0.0
    mapped: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Sharding:
    """What a DeepSpeed dictionary does to memory; stage 0 is none."""

    stage: int
    workers: int
    buckets: float  # numbers in the buffers that gradients are reduced through
    live: float  # numbers that ZeRO-3 keeps gathered at most
    on_gpu: bool
    offloads_optimizer: bool
    offloads_parameters: bool

    @classmethod
    def of(cls, deepspeed: dict[str, Any] | None, workers: int, on_gpu: bool) -> "Sharding":
        zero = (deepspeed or {}).get("zero_optimization") or {}

        def device(key: str) -> bool:
            return (zero.get(key) or {}).get("device", "none") not in ("none", None)

        bucket, copies = zero.get("reduce_bucket_size", 5e8), 2 if zero.get("overlap_comm") is True else 1
        return cls(
            stage=zero_stage(deepspeed) or 0,
            workers=workers,
            buckets=copies * (5e8 if bucket == "auto" else float(bucket)),
            live=float(live) if (live := zero.get("stage3_max_live_parameters", "auto")) != "auto" else 1e9,
            on_gpu=on_gpu,
            offloads_optimizer=device("offload_optimizer"),
            offloads_parameters=device("offload_param"),
        )

    def states(self, trainable: float, size: int, frozen_bytes: float) -> tuple[dict[str, float], float]:
        """Weights, gradients and optimizer state of one worker, and the bytes that are offloaded to its RAM.

        Args:
            trainable: numbers that learn, of `size` bytes each in the forward pass.
            frozen_bytes: of weights that do not learn.
        """
        n = self.workers
        if self.stage == 0:
            return {
                "weights": trainable * size + frozen_bytes,
                "gradients": trainable * size,
                "optimizer": 2 * trainable * size,
            }, 0.0
        master = 12 * trainable / n  # float32 copy and Adam's two moments
        gradients = trainable * size if self.stage == 1 else trainable * size / n
        weights, offloaded = trainable * size + frozen_bytes, 0.0
        # The buffer is allocated whole; of what was never written to, a CPU holds no page.
        buckets = (self.buckets if self.on_gpu else min(self.buckets, trainable)) * size
        if self.stage == 3:
            buckets *= 2  # reduce_scatter_coalesced makes one tensor of all gradients in the bucket
            weights = weights / n
            if self.offloads_parameters:
                weights, offloaded = 0.0, offloaded + weights
            weights += min(self.live, trainable + frozen_bytes / size) * size
        if self.offloads_optimizer:
            offloaded += master + 4 * trainable / n
            master = 0.0
        return {"weights": weights, "gradients": gradients + buckets, "optimizer": master}, offloaded


def estimates(run: Run, shapes: Mapping[str, ModelShape]) -> dict[str, Estimate]:
    """The peak of one process of each role, by the key of its number; roles whose model is not known are left out.

    Args:
        shapes: by key of the run file, as `shapes.read_shapes` gives them.
    """
    found: dict[str, Estimate] = {}
    for each in run.processes():
        held = [use.key for use in run.models() if each.key in use.held_by]
        if all(key in shapes for key in held):
            found[each.key] = _ESTIMATES[each.role](run, {key: shapes[key] for key in held})
    return found


def supervised_worker(run: SupervisedRun, shape: ModelShape) -> Estimate:
    """One worker of SFT, reward modelling or DPO under TRL's trainer."""
    on_gpu = run.learner.uses_gpu
    asked = str((run.training.get("model_init_kwargs") or {}).get("dtype") or "")
    size = _size(asked or ("float32" if run.holds_float32 else run.model.dtype), on_gpu)
    half = on_gpu or bool(run.training.get("bf16")) or run.model.dtype == "bfloat16"
    workers = run.learner.max_workers
    sharding = Sharding.of(run.learner.deepspeed, workers, on_gpu)
    trainable, frozen = float(shape.parameters), 0.0
    trained_size = size
    if run.lora is not None:
        trainable, frozen = float(lora_parameters(shape, run.lora)), shape.parameters * float(size)
        trained_size = size if sharding.stage == 3 else 4  # PEFT keeps adapters in float32, under ZeRO-3 it does not
    parts, offloaded = sharding.states(trainable, trained_size, frozen)
    if not sharding.stage:
        if workers > 1:
            parts["gradients"] *= 2  # DDP's buckets are a second copy
        parts["optimizer"] *= _optimizer_share(str(run.training.get("optim", "adamw")))
    if half and size == 4:
        parts["weights"] += shape.parameters * 2.0  # autocast's copies
    rows = run.rows_a_pass * run.sequences_a_row
    tokens = rows * int(run.native("max_length") or 1024)
    if run.has_reference:
        parts["reference"] = shape.parameters * float(size) / (workers if sharding.stage == 3 else 1)
    parts["activations"] = activations(shape, tokens, 2 if half else 4, bool(run.recompute))
    if run.head == "causal":
        head = shape.vocab * shape.hidden * 4.0 * (1 if run.lora is None else 0)
        parts["activations"] += head + _TILE_COPIES * 4.0 * min(tokens, _TILE[0]) * min(shape.vocab, _TILE[1])
    if run.lora is not None or sharding.stage == 3:  # the first worker merges or gathers the whole in RAM
        parts |= {} if on_gpu else {"saving": shape.parameters * float(size)}
    return _finish(parts, offloaded, on_gpu, "peft" if run.lora else "supervised", shape.parameters * float(size))


def activations(shape: ModelShape, tokens: int, size: int, recomputed: bool) -> float:
    """Bytes that the backward pass needs of a batch."""
    return tokens * activation_bytes(shape.linear_width, shape.hidden, shape.layers, size, recomputed)


def microbatch_of(run: Run, shapes: Mapping[str, ModelShape]) -> int | None:
    """Tokens in one forward pass of a PPO learner; None for other kinds, and where its models are not known."""
    policy = shapes.get("model.path")
    if not isinstance(run, PpoRun) or policy is None:
        return None
    return run.microbatch_tokens(_token_bytes(run, policy, shapes.get("value_model.init")))


def _token_bytes(run: PpoRun, policy: ModelShape, value: ModelShape | None) -> float:
    """What an update's backward pass needs of a token."""
    size, recomputed = _size(run.model.dtype, run.learner.uses_gpu), run.ppo.gradient_checkpointing
    trained = [policy, value or policy] if run.has_value_model else [policy]
    return sum(activations(shape, 1, size, recomputed) for shape in trained)


def ppo_worker(
    run: PpoRun, policy: ModelShape, value: ModelShape | None = None, reference: ModelShape | None = None
) -> Estimate:
    """One learner worker of PPO; `value` and `reference` where the run file names models of their own."""
    on_gpu, workers = run.learner.uses_gpu, run.learner.max_workers
    size = _size(run.model.dtype, on_gpu)
    critics = 1.0 if run.has_value_model else 0.0
    value_numbers = critics * (value or policy).parameters
    if run.lora is None:
        trainable = policy.parameters + value_numbers
        other, has_reference = reference or policy, 1.0 if run.has_reference else 0.0
        its_embeddings = other.vocab * other.hidden * float(4 - size)  # which are float32
        frozen = has_reference * (other.parameters * float(size) + its_embeddings)
        copies = trainable
    else:
        adapter = float(lora_parameters(policy, run.lora))
        trainable = adapter + (critics * adapter if value is None else value_numbers)
        frozen = (policy.parameters + (reference.parameters if reference else 0)) * float(size)
        copies = 0.0 if value is None else value_numbers
    sharding = Sharding.of(run.learner.deepspeed, workers, on_gpu)
    parts, offloaded = sharding.states(trainable, 4, frozen)  # what learns is float32
    if size == 2:  # autocast's copies of float32 weights, which the backward pass needs
        parts["weights"] += 2 * copies / (max(1, policy.layers) if run.ppo.gradient_checkpointing else 1)
    token_bytes = _token_bytes(run, policy, value)
    tokens = run.microbatch_tokens(token_bytes)
    responses = tokens * run.rollout.sampling.max_new_tokens / run.longest_row
    parts["activations"] = tokens * token_bytes + _head(policy, responses, on_gpu, trained=run.lora is None)
    if not on_gpu:
        # What is saved is made whole in RAM; activations are gone then, but malloc has not given back their pages.
        parts["saving"] = max(policy.parameters, value_numbers) * float(size)
    # DeepSpeed writes to all weights when it starts, so none of them stay pages of a file.
    files = [shape.file_size for shape in (policy, reference) if shape is not None]
    is_mapped = not on_gpu and run.learner.deepspeed is None and all(size == of_file for of_file in files)
    # With a GPU: models are read into RAM before they move there, but for those that are sharded from the start.
    loading = 0.0 if sharding.stage == 3 else 4.0 * trainable + frozen
    estimate = _finish(parts, offloaded, on_gpu, "learner", max(loading, policy.parameters * float(size)))
    return replace(estimate, mapped=frozen if is_mapped else 0.0)


def _head(shape: ModelShape, tokens: float, on_gpu: bool, *, trained: bool) -> float:
    """What log-probs of so many tokens take beside their hidden states."""
    chunk = HEAD_CHUNK["gpu" if on_gpu else "cpu"]
    if shape.vocab <= chunk and not on_gpu:
        return tokens * shape.vocab * LOGIT_BYTES
    copies = 1 if on_gpu else _TILE_COPIES  # a kernel works in place
    tile = copies * 4.0 * min(tokens, _TILE[0]) * min(shape.vocab, chunk)
    return tile + (4.0 * shape.vocab * shape.hidden if trained else 0.0)  # the head's gradient is summed up apart


def rollout_actor(run: RolloutRun, shape: ModelShape) -> Estimate:
    """One rollout actor: weights, and with transformers the key-value cache of the chunk in hand."""
    if run.rollout.engine == "vllm":
        return _vllm_actor(run, shape)
    on_gpu = run.rollout.uses_gpu
    size = _size(run.model.dtype, run.uses_gpu)
    rows = run.rollout.chunk_prompts * run.samples_a_prompt
    parts = {
        "weights": shape.parameters * float(size) * (run.engine_versions if run.loads_whole_models else 1),
        "cache": float(rows * run.longest_row * shape.layers * shape.kv_width * size),
        "activations": _forward(shape, rows * run.rollout.max_prompt_length, size),
    }
    parts["sampling"] = rows * shape.vocab * 24.0  # float64 probabilities, where the logits are
    travelling = _travelling(run, shape.parameters * float(size))
    if not on_gpu:
        parts["new weights"] = travelling
        parts["tools"] = _tools(run)
    return _finish(parts, _tools(run) if on_gpu else 0.0, on_gpu, "rollout", travelling)


def _tools(run: RolloutRun) -> float:
    """RAM of the processes of an actor's tools: one with the user's files, as for a reward function, and its copies."""
    if not run.rollout.converses:
        return 0.0
    conversations = run.rollout.chunk_prompts * run.samples_a_prompt * (2 if run.rollout.engine == "vllm" else 1)
    return LIBRARIES_GIB["function"] * GIB + conversations * _CONVERSATION_BYTES


def _travelling(run: RolloutRun, weights: float) -> float:
    """The object store's pages that an actor reads new weights from: the last version's place is not taken again at once."""
    return 2.0 * weights if run.loads_whole_models else 0.0


def _vllm_actor(run: RolloutRun, shape: ModelShape) -> Estimate:
    """One rollout actor with vLLM; on a GPU its cache takes what is left of its share."""
    on_gpu = run.rollout.uses_gpu
    size = _size(run.model.dtype, run.uses_gpu)
    length = run.longest_row + 1
    tokens = cpu_batch_tokens(run.rollout, length)
    if on_gpu:
        tokens = run.rollout.engine_args.get("max_num_batched_tokens") or _GPU_BATCH_TOKENS
    weights = shape.parameters * float(size)
    parts = {"weights": weights, "activations": _vllm_forward(shape, tokens, size)}
    # With LoRA the base lies in mapped files, from which the merged layers are made one by one.
    travelling = _travelling(run, weights)
    if not on_gpu:
        parts["weights"] += 2.0 * shape.vocab * shape.hidden * size  # embedding and head are kept packed as well
        parts["cache"] = float(cpu_cache_bytes(run.rollout, shape.layers * shape.kv_width * size, length))
        parts["new weights"] = travelling
        parts["tools"] = _tools(run)
    estimate = _finish(parts, _tools(run) if on_gpu else 0.0, on_gpu, "vllm", travelling)
    if not on_gpu:
        return estimate
    share = run.rollout.engine_args.get("gpu_memory_utilization") or 0.9 * min(1.0, run.rollout.resources["GPU"])
    return replace(estimate, share=float(share))


def reward_actor(run: RolloutRun, shapes: Mapping[str, ModelShape]) -> Estimate:
    """One reward actor: each of its models (by key of the run file), and a process for each function."""
    on_gpu = run.reward.uses_gpu
    weights = batch = largest = 0.0
    functions = sum(source.kind == "function" for source in run.reward.sources)
    for i, source in enumerate(run.reward.sources):
        if (shape := shapes.get(f"reward.sources.{i}.model")) is None:
            continue
        size = _size(source.dtype, on_gpu)
        weights += shape.parameters * float(size)
        largest = max(largest, shape.parameters * float(size))
        tokens = (source.batch_size or 32) * run.longest_row
        batch = max(batch, _forward(shape, tokens, size))
    parts = {"weights": weights, "activations": batch}
    extra = functions * LIBRARIES_GIB["function"] * GIB
    if not on_gpu and extra:
        parts["reward functions"] = extra
    return _finish(parts, extra if on_gpu else 0.0, on_gpu, "reward", largest)


def server(run: ServeRun, shape: ModelShape) -> Estimate:
    """One replica of what is served; a policy's requests are as long as the model allows."""
    on_gpu, size = run.uses_gpu, _size(run.serve.dtype, run.uses_gpu)
    weights = shape.parameters * float(size)
    if run.scores:
        parts = {"weights": weights, "activations": _forward(shape, _SCORED_TOKENS, size)}
        return _finish(parts, 0.0, on_gpu, "reward", weights)
    token_bytes = shape.layers * shape.kv_width * size
    length = int(run.serve.engine_args.get("max_model_len") or run.max_tokens or _UNKNOWN_LENGTH)
    if run.serve.engine != "vllm":
        rows = min(run.serve.max_ongoing, BATCH_ROWS)
        parts = {"weights": weights, "cache": float(rows * length * token_bytes)}
        parts["activations"] = _forward(shape, max(length, BATCH_PROMPT_TOKENS), size)
        return _finish(parts, 0.0, on_gpu, "rollout", weights)
    tokens = cpu_batch_tokens(run.sampling, length)
    if on_gpu:
        tokens = run.serve.engine_args.get("max_num_batched_tokens") or _GPU_BATCH_TOKENS
    parts = {"weights": weights, "activations": _vllm_forward(shape, tokens, size)}
    # Beside the one with the model: the process that answers, and on CPUs that of the engine, whose worker is apart.
    others = LIBRARIES_GIB["vllm"] * GIB * (1 if on_gpu else 2)
    if not on_gpu:
        parts["weights"] += 2.0 * shape.vocab * shape.hidden * size
        parts["cache"] = float(cpu_cache_bytes(run.sampling, token_bytes, length))
        parts["other processes"] = others
    estimate = _finish(parts, others if on_gpu else 0.0, on_gpu, "vllm", weights)
    share = run.serve.engine_args.get("gpu_memory_utilization") or 0.9 * min(1.0, run.serve.gpus)
    return replace(estimate, share=float(share)) if on_gpu else estimate


def benchmark_actor(run: BenchmarkRun, shape: ModelShape) -> Estimate:
    """One benchmark actor: weights, and a batch's hidden states and log-probabilities over the vocabulary."""
    section, on_gpu = run.benchmark, run.uses_gpu
    size = _size(run.model.dtype, on_gpu)
    weights, length = shape.parameters * float(size), section.max_length or _REQUEST_TOKENS
    tokens = section.batch_size * length
    parts = {"weights": weights, "activations": _forward(shape, tokens, size)}
    if section.engine != "vllm":
        parts["log-probs"] = tokens * shape.vocab * (4.0 + size)
    elif not on_gpu:
        rollout = section.as_rollout
        parts["activations"] = _vllm_forward(shape, cpu_batch_tokens(rollout, length), size)
        parts["weights"] += 2.0 * shape.vocab * shape.hidden * size  # embedding and head are kept packed as well
        parts["cache"] = float(cpu_cache_bytes(rollout, shape.layers * shape.kv_width * size, length))
    estimate = _finish(parts, 0.0, on_gpu, "benchmark", weights)
    return replace(estimate, share=0.9 * min(1.0, section.gpus)) if on_gpu and section.engine == "vllm" else estimate


def pairs_actor(run: PairsRun, shape: ModelShape) -> Estimate:
    """One actor that scores pairs with a reward model."""
    on_gpu = run.uses_gpu
    size = _size(run.model.dtype, on_gpu)
    weights, tokens = shape.parameters * float(size), run.pairs.batch_size * _REQUEST_TOKENS
    parts = {"weights": weights, "activations": _forward(shape, tokens, size)}
    return _finish(parts, 0.0, on_gpu, "reward", weights)


def _forward(shape: ModelShape, tokens: float, size: int) -> float:
    """What a forward pass of transformers takes in its widest layer, without gradients and without a cache."""
    return tokens * (3.0 * shape.hidden + 4 * shape.widest) * size


def _vllm_forward(shape: ModelShape, tokens: float, size: int) -> float:
    """As `_forward`; gate and up are one matrix there, and the product takes the place of one of them."""
    return tokens * (2.0 * shape.hidden + 3 * shape.widest) * size


def _finish(parts: dict[str, float], offloaded: float, on_gpu: bool, libraries: str, loading: float) -> Estimate:
    """Adds the process itself; on a GPU also what it needs of RAM: libraries, and the weights while they are loaded."""
    process = LIBRARIES_GIB[libraries] * GIB
    if on_gpu:
        kept = {name: size for name, size in {**parts, "CUDA": CUDA_GIB * GIB}.items() if size}
        return Estimate(kept, process + offloaded + loading)
    everything = {**parts, "offloaded": offloaded, "libraries": process}
    return Estimate({name: size for name, size in everything.items() if size})


def _largest(shapes: Mapping[str, ModelShape]) -> ModelShape:
    """An evaluation's engines load one model after the other."""
    return max(shapes.values(), key=lambda shape: shape.parameters)


def _size(dtype: str, on_gpu: bool) -> int:
    """Bytes of one number of `model.dtype`."""
    if dtype == "auto":
        return 2 if on_gpu else 4
    return 2 if dtype.removeprefix("torch.") in ("bfloat16", "float16") else 4


def _optimizer_share(optim: str) -> float:
    """State of an optimizer as a share of Adam's two moments."""
    if "8bit" in optim:
        return 0.25
    return 0.0 if optim in ("sgd", "adafactor") else 0.5 if optim in ("rmsprop", "adagrad", "lion") else 1.0


# By role: the run, and the shapes of the models that a process of it holds, by key → one process.
_ESTIMATES: Mapping[str, Callable[[Any, Mapping[str, ModelShape]], Estimate]] = {
    "trainer": lambda run, held: supervised_worker(run, held["model.path"]),
    "learner": lambda run, held: ppo_worker(
        run, held["model.path"], held.get("value_model.init"), held.get("reference.path")
    ),
    "rollout": lambda run, held: rollout_actor(run, _largest(held)),
    "reward": lambda run, held: reward_actor(run, held),
    "server": lambda run, held: server(run, held["run"]),
    "benchmark": lambda run, held: benchmark_actor(run, _largest(held)),
    "pairs": lambda run, held: pairs_actor(run, _largest(held)),
}
