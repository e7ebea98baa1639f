"""A tiny world for PPO: eight tokens, prompts of different lengths, a rule reward, everything in this process."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raytrl.config.sections.ppo import PpoSection
from raytrl.config.sections.rollout import RolloutSection, SamplingSection
from raytrl.loop.protocols import Rollout
from raytrl.records.samples import Prompt, Response, Score, chunks
from raytrl.roles.learner.build import assemble, build_backend
from raytrl.roles.learner.learner import PpoLearner
from raytrl.roles.models.adapters import add_policy_adapter
from raytrl.roles.rollout.engine import RolloutEngine
from raytrl.roles.rollout.transformers_engine import TransformersEngine
from raytrl.roles.weights.buckets import Weights

if TYPE_CHECKING:
    from raytrl.roles.rollout.vllm.engine import VllmEngine

VOCABULARY, EOS = 8, 7
PROMPTS = [(1,), (2, 3), (4, 5, 6), (3, 1)]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1}


class DigitTokenizer:
    """Decodes to digits; id 0 is a token like any other, which the policy may sample."""

    eos_token_id = EOS

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        return "".join(str(token) for token in token_ids if not (skip_special_tokens and token == EOS))


def gpt2(seed: int = 0, *, width: int = 32, layers: int = 1, dropout: float = 0.1, spread: float = 0.3) -> nn.Module:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        initializer_range=spread,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def llama(seed: int = 0, *, width: int = 32, heads: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
        attention_dropout=0.1,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def reward(prompt: Sequence[int], response: Sequence[int]) -> float:
    """A rule over tokens, neighbours, the prompt's end and the end token; easy for one layer to express."""
    total = 0.5 * sum(token in (0, 5) for token in response) + 0.2 * (response[-1] == EOS)
    return total - 0.3 * (tuple(response[:1]) == tuple(response[1:2])) + 0.3 * (response[0] == prompt[-1])


def prompt_batch(step: int, rows: Iterable[int]) -> list[Prompt]:
    return [
        Prompt(step=step, row=row, text=str(PROMPTS[row % len(PROMPTS)]), token_ids=PROMPTS[row % len(PROMPTS)])
        for row in rows
    ]


class Prompts:
    """Worker `rank` of `world` takes a contiguous share of the rows."""

    def __init__(self, per_step: int, rank: int = 0, world: int = 1) -> None:
        share = per_step // world
        self._rows = range(rank * share, (rank + 1) * share)

    def next(self, step: int) -> list[Prompt]:
        return prompt_batch(step, self._rows)

    def evaluation(self, step: int) -> list[Prompt]:
        return prompt_batch(step, range(4))


def tensors_of(weights: Weights) -> dict[str, torch.Tensor]:
    """All of them at once, copied."""
    return {name: tensor.clone() for tensors in weights.buckets for name, tensor in tensors.items()}


class LocalGenerator:
    """Engines in this process, taking the chunks in turn; with lanes, dealt to groups as `PoolGenerator`'s actors."""

    def __init__(
        self, engines: Sequence[RolloutEngine], samples: int, chunk_prompts: int = 8, *, lanes: int = 1
    ) -> None:
        self.engines, self.samples, self.chunk_prompts = list(engines), samples, chunk_prompts
        self.groups = -(-lanes // engines[0].num_versions)
        self.asked: list[tuple[int, int | None, list[int]]] = []  # version, lane, steps

    def _of(self, lane: int | None) -> list[RolloutEngine]:
        return self.engines if lane is None else self.engines[lane % self.groups :: self.groups]

    def generate(
        self, prompts: Sequence[Prompt], version: int, *, greedy: bool, lane: int | None = None
    ) -> list[list[Response]]:
        engines, samples = self._of(lane), 1 if greedy else self.samples
        self.asked.append((version, lane, sorted({prompt.step for prompt in prompts})))
        return [
            engines[i % len(engines)].generate(chunk, version, samples=samples, greedy=greedy)
            for i, chunk in enumerate(chunks(prompts, self.chunk_prompts))
        ]

    def load_weights(self, weights: Weights, lane: int | None = None, *, anew: bool = False) -> None:
        for engine in self._of(lane):
            if weights.version not in engine.versions:
                engine.load_weights(weights)


class LocalScorer:
    def __init__(self, value: Callable[[Prompt, Response], float | None] | None = None) -> None:
        self._value = value or (lambda prompt, response: reward(prompt.token_ids, response.token_ids))
        self._scores: list[Score] = []

    def submit(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> None:
        by_row = {prompt.row: prompt for prompt in prompts}
        for response in responses:
            value = self._value(by_row[response.row], response)
            self._scores.append(Score(response.step, response.row, response.sample, value, {"rule": value}))

    def collect(self) -> list[Score]:
        scores, self._scores = self._scores, []
        return scores


class Log:
    """Keeps what was reported; saves where a checkpoint is due."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.metrics: list[dict[str, float]] = []
        self.rollouts: list[Rollout] = []
        self.evaluations: list[Rollout | None] = []

    def report(
        self,
        step: int,
        metrics: Mapping[str, float],
        rollout: Rollout,
        evaluation: Rollout | None,
        save: Callable[[Path], None] | None,
    ) -> None:
        self.metrics.append(dict(metrics))
        self.rollouts.append(rollout)
        self.evaluations.append(evaluation)
        if save is not None and self.folder is not None:
            save(self.folder / str(step))


def config(**changes: Any) -> PpoSection:
    base: dict[str, Any] = {"steps": 4, "batch_size": 16, "minibatches": 2, "epochs": 2, "learning_rate": 1e-3}
    return PpoSection(**(base | changes))


def vllm_engine(
    model: nn.Module, folder: Path, *, lora: bool = False, dtype: torch.dtype = torch.float32
) -> "VllmEngine":
    from raytrl.roles.rollout.vllm.engine import VllmEngine

    deepcopy(model).to(dtype).save_pretrained(folder)  # type: ignore[operator]
    digits = Tokenizer(models.WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=digits, eos_token=str(EOS)).save_pretrained(folder)
    rollout = RolloutSection(engine="vllm", sampling={"max_new_tokens": 3}, max_prompt_length=8)
    adapter = LORA if lora else None
    return VllmEngine.from_pretrained(str(folder), str(folder), rollout, seed=0, lora=adapter, dtype=dtype)


def make_learner(
    model: nn.Module,
    ppo: PpoSection,
    *,
    lora: bool = False,
    seed: int = 0,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    shared: bool = False,
) -> PpoLearner:
    torch.manual_seed(seed)
    adapter, recompute = LORA if lora else None, ppo.gradient_checkpointing
    networks = assemble(
        model.to(dtype),
        critic=ppo.has_critic,
        reference_needed=ppo.kl.coef > 0,
        shared=shared,
        lora=adapter,
        dtype=dtype,
        gradient_checkpointing=recompute,
    )
    return PpoLearner(
        build_backend(networks, ppo),
        ppo,
        temperature=temperature,
        seed=seed,
        max_new_tokens=3,
        reference="start" if ppo.kl.coef > 0 else None,
    )


def make_engine(
    model: nn.Module,
    *,
    lora: bool = False,
    seed: int = 0,
    chunk: int = 8,
    dtype: torch.dtype = torch.float32,
    num_versions: int = 1,
    **sampling: Any,
) -> TransformersEngine:
    policy = add_policy_adapter(model.to(dtype), LORA) if lora else model.to(dtype)
    return TransformersEngine(
        policy,
        DigitTokenizer(),
        SamplingSection(**({"max_new_tokens": 3} | sampling)),
        seed=seed,
        chunk_prompts=chunk,
        num_versions=num_versions,
    )
