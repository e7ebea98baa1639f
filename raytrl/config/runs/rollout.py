"""What the run files of `raytrl ppo` and `raytrl eval` have in common: rollout and reward actors, and a reference."""

from collections.abc import Mapping
from typing import ClassVar

from raytrl.config.runs.base import Columns, ModelUse, Processes, Run
from raytrl.config.sections.engines import Asked, engine_words
from raytrl.config.sections.model import ModelSection
from raytrl.config.sections.ppo import ReferenceSection
from raytrl.config.sections.reward import RewardSection
from raytrl.config.sections.rollout import RolloutSection


class RolloutRun(Run):
    """A run whose model's responses are sampled and scored."""

    gives_columns_to_rewards: ClassVar[bool] = True

    model: ModelSection
    """The network whose responses are sampled: a finished one, or the one that PPO goes on from."""
    rollout: RolloutSection = RolloutSection()
    """Who samples responses, and how."""
    reward: RewardSection = RewardSection()
    """Who scores responses, and by what."""
    reference: ReferenceSection = ReferenceSection()
    """The model that the KL of the responses is measured against."""

    @property
    def tokenizer_path(self) -> str:
        """Where the tokenizer of `model` is."""
        assert isinstance(self.model.tokenizer, str | None)
        return str(self.model.tokenizer or self.model.path)

    @property
    def asked(self) -> Asked:
        """What the run wants of its rollout engine."""
        raise NotImplementedError

    @property
    def prompts_at_a_time(self) -> int | None:
        """Prompts that are sampled from at a time: of a step, or of all; None where nobody has counted them."""
        raise NotImplementedError

    @property
    def samples_a_prompt(self) -> int:
        return 1

    @property
    def longest_row(self) -> int:
        """Tokens of a prompt and its response at most."""
        return self.rollout.max_prompt_length + self.rollout.sampling.max_new_tokens

    @property
    def loads_whole_models(self) -> bool:
        """Whether engines are given whole models, not adapters alone."""
        return True

    @property
    def engine_versions(self) -> int:
        """Versions of the policy that a rollout engine holds side by side."""
        return 1

    @property
    def lanes(self) -> int:
        """Batches that may be on their way at a time."""
        return 1

    @property
    def lane_groups(self) -> int:
        """Groups that rollout actors are dealt to, each of which has its own batch in hand."""
        return 1

    def processes(self) -> tuple[Processes, ...]:
        rollout, reward = self.rollout, self.reward
        return (
            Processes("rollout.actors", "rollout", rollout, rollout.actors, rollout.actors),
            Processes("reward.actors", "reward", reward, reward.actors, reward.actors),
        )

    def layouts(self) -> tuple[Columns, ...]:
        # An environment may own all that is said: the prompt is an empty message then.
        return (("prompt",), ()) if self.rollout.environment is not None else (("prompt",),)

    def bf16_on_cpu(self) -> list[str]:
        scores = [] if self.reward.uses_gpu else [s for s in self.reward.sources if s.dtype == "bfloat16"]
        return super().bf16_on_cpu() + [f"reward.sources.{source.name}.dtype" for source in scores]

    def assumed(self) -> list[str]:
        if not self._elsewhere or self.rollout.engine != "vllm":
            return []
        return [
            "rollout.engine: vllm, which raytrl's image for GPUs has; for a cluster without it plan with "
            "rollout.engine=transformers"
        ]

    def tokenizers(self) -> Mapping[str, str]:
        return {"model.tokenizer": self.model.tokenizer} if isinstance(self.model.tokenizer, str) else {}

    def user_functions(self) -> Mapping[str, str]:
        rollout = self.rollout
        named = {
            f"rollout.environment.{name}" if name else "rollout.environment": p
            for name, p in rollout.environments.items()
        }
        functions = {
            f"reward.sources.{i}.function": source.function
            for i, source in enumerate(self.reward.sources)
            if source.function is not None
        }
        return {**functions, **{f"rollout.tools.{i}": place for i, place in enumerate(rollout.tools)}, **named}

    def functions_by_source(self) -> Mapping[str, str]:
        """Places of reward functions by the names of their sources."""
        return {source.name: source.function for source in self.reward.sources if source.function is not None}

    def _use(self, key: str, path: str, held_by: tuple[str, ...], score: bool = False) -> ModelUse:
        trust = self.model.trust_remote_code
        return ModelUse(key, path, "score" if score else "causal", held_by, None, trust, new_head=score)

    def _reward_models(self) -> tuple[ModelUse, ...]:
        return tuple(
            ModelUse(f"reward.sources.{i}.model", source.model, "score", ("reward.actors",), adapters=True)
            for i, source in enumerate(self.reward.sources)
            if source.model is not None
        )

    def _rewards_in_words(self) -> tuple[str, str]:
        words = [f"{source.weight:g} x {source.name}" for source in self.reward.sources]
        if self.rollout.environment is not None and all(source.kind != "environment" for source in self.reward.sources):
            words.append("get_reward of the environment, where it has one")
        return "reward", " + ".join(words)

    def _tools_in_words(self) -> list[tuple[str, str]]:
        rollout = self.rollout
        if not rollout.converses:
            return []
        places = [*rollout.tools, *(f"{name}: {p}" if name else p for name, p in rollout.environments.items())]
        return [
            (
                "tools",
                f"{', '.join(places)}; calls are answered {rollout.max_turns} times at most, each in "
                f"{rollout.tool_timeout_s:g} s, in a process of the conversation's own (no sandbox: it may read and send "
                f"whatever this user may)",
            )
        ]

    def _reward_problems(self) -> list[str]:
        """Sources that nothing scores."""
        if self.rollout.environment is not None:
            return []
        if not self.reward.sources:
            return [
                "reward.sources: nothing scores a response; found: no sources; expected: at least 1 item, a model, function or "
                "url, or a rollout.environment with a get_reward"
            ]
        return [
            f"reward.sources.{i}: source {source.name!r}; found: none of model, function, url; expected: exactly one of them, or "
            f"a rollout.environment whose class is called {source.name}"
            for i, source in enumerate(self.reward.sources)
            if source.kind == "environment"
        ]

    def _engine_in_words(self) -> tuple[str, str]:
        takes_rest = self.rollout.engine == "vllm" and self.rollout.uses_gpu
        cache = " (key-value cache: what is left of its share of the GPU)" if takes_rest else ""
        return "rollout", engine_words(self.asked) + cache

    def _idle_actors(self) -> list[str]:
        """Actors for which there is never a chunk."""
        rows, rollout, reward = self.prompts_at_a_time, self.rollout, self.reward
        chunks = None if rows is None else -(-rows // rollout.chunk_prompts)
        lines = []
        at_a_time = None if chunks is None else chunks * self.lanes
        if at_a_time is not None and rollout.actors > at_a_time:
            lines.append(
                f"rollout.actors: {rollout.actors - at_a_time} of {rollout.actors} would always be idle: the prompts come in "
                f"{at_a_time} chunks of rollout.chunk_prompts {rollout.chunk_prompts}"
            )
        if chunks is not None and reward.actors > chunks:
            lines.append(
                f"reward.actors: {reward.actors - chunks} of {reward.actors} would always be idle: responses come in "
                f"{chunks} chunks"
            )
        return lines
