"""The rollout engine on vLLM: the same on CPUs and GPUs, with a continuous batch."""

import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from raytrl.config.sections.engines import CPU_SEQUENCES, cpu_batch_tokens, cpu_cache_bytes, gpus_asked
from raytrl.config.sections.rollout import RolloutSection, SamplingSection
from raytrl.errors import RunError
from raytrl.records.samples import Prompt, Response
from raytrl.roles.device import VLLM_ENVIRONMENT
from raytrl.roles.models.loading import look_at
from raytrl.roles.rollout.engine import Sampled, SamplingEngine, Tokenizer, Turn, Wanted
from raytrl.roles.rollout.vllm.adapters import Adapters, adapter_arguments
from raytrl.roles.rollout.vllm.batch import ContinuousBatch
from raytrl.roles.weights.buckets import Bucket


class VllmEngine(SamplingEngine):
    """Samples with vLLM; responses of several calls share its continuous batch.

    The log-probs of greedy responses are those of temperature 1.
    """

    concurrent = True

    def __init__(
        self,
        batch: ContinuousBatch,
        tokenizer: Tokenizer,
        sampling: SamplingSection,
        *,
        seed: int,
        stop_token_ids: Sequence[int] = (),
        chunk_prompts: int = 8,
        adapters: Adapters | None = None,
        num_versions: int = 1,
    ) -> None:
        """`stop_token_ids` are the model's own, see `Endings`; `seed` is the run's; `adapters`: what serves several versions."""
        super().__init__(
            tokenizer,
            sampling,
            seed=seed,
            stop_token_ids=stop_token_ids,
            chunk_prompts=chunk_prompts,
            num_versions=num_versions,
        )
        self._batch, self._adapters = batch, adapters

    @classmethod
    def from_pretrained(
        cls,
        model_path: str,
        tokenizer_path: str,
        rollout: RolloutSection,
        *,
        seed: int,
        lora: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        trust_remote_code: bool = False,
        num_versions: int = 1,
    ) -> "VllmEngine":
        """An engine for the learner's model; as `TransformersEngine.from_pretrained`. Only of adapters it holds several versions.

        `rollout.engine_args` are fields of vLLM's `EngineArgs` and replace what is chosen here.
        """
        assert num_versions == 1 or lora is not None, "refused with the run file"
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        arguments = {
            "model": model_path,
            "tokenizer": tokenizer_path,
            "trust_remote_code": trust_remote_code,
            "dtype": str(dtype).removeprefix("torch."),
            **_chosen_arguments(rollout, config.get_text_config(), dtype, device),
            **(adapter_arguments(lora, num_versions) if lora is not None and num_versions > 1 else {}),
            **rollout.engine_args,
        }
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, trust_remote_code=trust_remote_code)
        if not os.path.isdir(model_path):  # of the hub: it was not here before the start, and vLLM asks less
            look_at(model_path, "causal", "rollout", trust_remote_code=trust_remote_code)
        batch = ContinuousBatch(_maker(arguments, device))
        adapters = None
        if lora is not None and num_versions > 1:
            adapters = Adapters(batch, model_path, lora, dtype, trust_remote_code)
        elif lora is not None:
            expected = (model_path, lora, trust_remote_code)
            batch.call(lambda engine: engine.collective_rpc("raytrl_expect_adapters", args=expected))
        return cls(
            batch,
            tokenizer,
            rollout.sampling,
            seed=seed,
            stop_token_ids=_end_tokens(model_path, config),
            chunk_prompts=rollout.chunk_prompts,
            adapters=adapters,
            num_versions=num_versions,
        )

    def close(self) -> None:
        self._batch.close()
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()  # else its torch.distributed group outlives the engine

    def _begin(self) -> None:
        if self._adapters is not None:
            self._adapters.begin()
        else:
            self._batch.call(_begin_weights)

    def _drop(self, version: int) -> None:
        if self._adapters is not None:
            self._adapters.drop(version)

    def _take(self, bucket: Bucket) -> str:
        if self._adapters is not None:
            return self._adapters.take(bucket.tensors)
        return self._batch.call(lambda engine: _take_weights(engine, bucket.tensors))

    def _finish(self, version: int) -> None:
        if self._adapters is not None:
            self._adapters.finish(version)
        else:
            self._batch.call(_finish_weights)

    def _adapter(self, version: int) -> Any:
        return None if self._adapters is None else self._adapters.of(version)

    def submit(self, turns: Sequence[Turn], version: int, greedy: bool, wanted: Wanted) -> "list[Future[Sampled]]":
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        asked = []
        for turn in turns:
            stop = partial(self._stops, turn.prompt) if self._stop else None
            params = SamplingParams(
                max_tokens=turn.room,
                temperature=0.0 if greedy else self._sampling.temperature,
                seed=None if greedy else turn.seed,
                logprobs=0,  # of the sampled token alone
                stop_token_ids=self._endings.of(turn.prompt),
                detokenize=False,
                output_kind=RequestOutputKind.CUMULATIVE if stop else RequestOutputKind.FINAL_ONLY,
            )
            made: Future[Any] = self._batch.submit(turn.token_ids, params, stop, wanted, self._adapter(version))
            asked.append(_then(made, partial(self._sampled, turn)))
        return asked

    def _sampled(self, turn: Turn, output: Any) -> Sampled:
        (made,) = output.outputs
        if list(output.prompt_token_ids) != list(turn.token_ids):
            raise RunError(f"rollout engine: row {turn.prompt.row}: vLLM went on from other tokens than it was given")
        token_ids = tuple(int(token) for token in made.token_ids)
        given = [float(place[token].logprob) for place, token in zip(made.logprobs, token_ids, strict=True)]
        if made.finish_reason not in (None, "stop", "length"):  # None: ended here, by a stop string
            raise RunError(
                f"rollout engine: row {turn.prompt.row}: vLLM ended the response with {made.finish_reason!r}"
            )
        return Sampled(
            token_ids,
            tuple(logprob if math.isfinite(logprob) else math.nan for logprob in given),
            made.finish_reason != "length" or self._stop.are_in(turn.prompt, token_ids),
        )

    def _stops(self, prompt: Prompt, token_ids: Sequence[int]) -> bool:
        """By a stop string; looked for here, since vLLM's own search can take in the prompt's last characters."""
        return self._stop.may_end(token_ids[-self._stop.window :]) and self._stop.are_in(prompt, token_ids)

    def _logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response], version: int) -> list[float]:
        from vllm import SamplingParams

        assert self._sampling.temperature == 1.0, "refused with the run file"
        by_row = {prompt.row: prompt for prompt in prompts}
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        adapter = self._adapter(version)
        contexts = [response.prompt_of(by_row[response.row]).token_ids for response in responses]
        asked = [
            self._batch.submit([*context, *response.token_ids], params, adapter=adapter)
            for context, response in zip(contexts, responses, strict=True)
        ]
        sums = []
        for response, future in zip(responses, asked, strict=True):
            places = future.result().prompt_logprobs[-len(response.token_ids) :]
            logprobs = [place[token].logprob for place, token in zip(places, response.token_ids, strict=True)]
            sums.append(math.fsum(logprob for first, last in response.sampled for logprob in logprobs[first:last]))
        return sums


def _then(future: "Future[Any]", convert: Callable[[Any], Sampled]) -> "Future[Sampled]":
    """What it is converted to, as soon as it is there."""
    found: Future[Sampled] = Future()

    def done(future: "Future[Any]") -> None:
        try:
            found.set_result(convert(future.result()))
        except BaseException as error:
            found.set_exception(error)

    future.add_done_callback(done)
    return found


def _begin_weights(engine: Any) -> None:
    if engine.has_unfinished_requests():
        raise RunError("rollout engine: new weights while responses are sampled; this is a fault in raytrl")
    engine.collective_rpc("raytrl_begin_weights")


def _take_weights(engine: Any, tensors: Mapping[str, Tensor]) -> str:
    """Returns the checksum of what arrived in the model, the same in all of its processes."""
    if engine.vllm_config.parallel_config.world_size == 1:
        (found,) = engine.collective_rpc("raytrl_take_weights", args=(list(tensors.items()),))
        return str(found)
    # Each process would be sent a copy of its own: they map this one. Not in /dev/shm, which a container keeps small.
    with tempfile.NamedTemporaryFile(prefix="raytrl-") as file:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file.name)
        checksums = set(engine.collective_rpc("raytrl_take_file", args=(file.name,)))
    if len(checksums) != 1:
        raise RunError(f"rollout engine: vLLM's processes hold different weights; found checksums {sorted(checksums)}")
    return str(checksums.pop())


def _finish_weights(engine: Any) -> None:
    engine.collective_rpc("raytrl_finish_weights")
    if not engine.reset_prefix_cache():
        raise RunError("rollout engine: vLLM's prefix cache could not be emptied for new weights")


def _chosen_arguments(rollout: RolloutSection, config: Any, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """What raytrl sets where `engine_args` does not, and what only it may set."""
    length = rollout.max_prompt_length + rollout.sampling.max_new_tokens + 1  # 1: log-probs of a response cost a token
    positions = getattr(config, "max_position_embeddings", None) or length
    chosen: dict[str, Any] = {
        "max_model_len": min(length, int(positions)),
        "logprobs_mode": "processed_logprobs",
        "skip_tokenizer_init": True,
        "worker_extension_cls": "raytrl.roles.rollout.vllm.worker.WeightLoading",
        "disable_log_stats": True,
    }
    if device != "cpu":
        return chosen | gpu_arguments(rollout)
    return chosen | cpu_arguments(rollout, config, dtype, chosen["max_model_len"])


def gpu_arguments(rollout: RolloutSection) -> dict[str, Any]:
    """Of an engine on the GPUs of its process."""
    gpus = rollout.resources.get("GPU", 1)
    # In an actor vLLM would else find Ray's placement group and take it for its own.
    chosen: dict[str, Any] = {"distributed_executor_backend": "mp" if gpus > 1 else "uni"}
    if gpus < 1:
        chosen["gpu_memory_utilization"] = 0.9 * gpus
    if gpus > 1 and gpus_asked(rollout.engine_args) is None:
        chosen["tensor_parallel_size"] = int(gpus)
    return chosen


def cpu_arguments(rollout: RolloutSection, config: Any, dtype: torch.dtype, length: int) -> dict[str, Any]:
    """Of an engine on CPUs.

    Args:
        config: of the model's text part.
        length: tokens of a sequence at most, unless `engine_args` says otherwise.
    """
    sequences = rollout.engine_args.get("max_num_seqs", CPU_SEQUENCES)
    chosen: dict[str, Any] = {
        "max_num_seqs": sequences,
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        # A prompt that is taken in by parts sets its generator back, which vLLM (0.32) can only do on a GPU: whole ones wait.
        "enable_chunked_prefill": False,
    }
    length = rollout.engine_args.get("max_model_len", length)
    chosen["max_num_batched_tokens"] = cpu_batch_tokens(rollout, length)
    if "gpu_memory_utilization" not in rollout.engine_args:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * head_size * dtype.itemsize
        chosen["kv_cache_memory_bytes"] = cpu_cache_bytes(rollout, token_bytes, length)
    return chosen


def _maker(arguments: Mapping[str, Any], device: str) -> Callable[[], Any]:
    def make() -> Any:
        for name, value in VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        # In one process there are no children that could outlive the actor, and weights need not be sent to any.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import EngineArgs, LLMEngine
        from vllm.usage.usage_lib import UsageContext

        # vLLM has a batch for its `LLM` and for its server; for whoever makes an engine it is an eighth of that on a GPU.
        context = UsageContext.ENGINE_CONTEXT if device == "cpu" else UsageContext.LLM_CLASS
        return LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=context)

    return make


def _end_tokens(model_path: str, config: Any) -> list[int]:
    """End tokens of the generation config, as the model itself would use."""
    try:
        ends = GenerationConfig.from_pretrained(model_path).eos_token_id
    except OSError:  # a folder without one
        ends = config.eos_token_id
    return list(ends) if isinstance(ends, list) else [] if ends is None else [int(ends)]
