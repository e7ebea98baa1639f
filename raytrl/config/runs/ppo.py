"""The run file of `raytrl ppo`: its sections, and what must agree between them."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import model_validator

from raytrl.config.foreign.deepspeed import check_for_ppo
from raytrl.config.runs.base import TrainingRun, or_raise
from raytrl.config.sections.engines import Asked, chosen_engine, engine_problems
from raytrl.config.sections.model import TokenizerSpec
from raytrl.config.sections.ppo import EvalSection, KlSection, PpoSection, ReferenceSection, ValueModelSection
from raytrl.config.sections.reward import RewardSection
from raytrl.config.sections.rollout import RolloutSection
from raytrl.config.sections.weight_transfer import chosen_transfer, transfer_problems


class PpoRun(TrainingRun):
    """PPO: learner workers on Ray Train, rollout and reward actors beside them."""

    kind: Literal["ppo"] = "ppo"
    """PPO against reward models, rules or endpoints."""
    rollout: RolloutSection = RolloutSection()
    """Who samples responses, and how."""
    reward: RewardSection
    """Who scores responses, and by what."""
    ppo: PpoSection = PpoSection()
    """The algorithm: how responses and their scores become updates."""
    value_model: ValueModelSection = ValueModelSection()
    """The value function: what it starts from."""
    reference: ReferenceSection = ReferenceSection()
    """The model that the KL penalty is measured against."""
    eval: EvalSection | None = None
    """Responses on data.eval, scored by the same sources. Left out: on where there is data.eval. null: none."""

    @property
    def tokenizer_path(self) -> str:
        """Where the policy's tokenizer is."""
        assert isinstance(self.model.tokenizer, str | None)
        return str(self.model.tokenizer or self.model.path)

    @property
    def asked(self) -> Asked:
        """What the run wants of its rollout engine."""
        return Asked(self.rollout, [str(self.model.path)], self.lora)

    @property
    def chunks_per_step(self) -> int:
        """Pieces that a step's prompts are sampled in."""
        return -(-self.ppo.prompts_per_step // self.rollout.chunk_prompts)

    @model_validator(mode="before")
    @classmethod
    def _evaluate_where_there_is_data(cls, values: Any) -> Any:
        """`data.eval` alone turns evaluation on, as in the other kinds; written here so that defaults are shown."""
        if isinstance(values, dict) and "eval" not in values:
            data = values.get("data")
            if isinstance(data, dict) and data.get("eval") is not None:
                return {**values, "eval": {}}
        return values

    @model_validator(mode="after")
    def _agreement(self) -> "PpoRun":
        # auto becomes a name here, so that the run file in the run directory says what a run was made with.
        transfer = chosen_transfer(self.rollout, self.learner, self.lora)
        self.__dict__["rollout"] = self.rollout.chosen(engine=chosen_engine(self.asked), weight_transfer=transfer)
        or_raise(self._model_problems() + self._role_problems() + self._idle_settings(), None)
        return self

    def _model_problems(self) -> list[str]:
        model, problems = self.model, []
        if model.path is None:
            problems.append("model.path: missing; PPO goes on from a trained model: a Hugging Face id or local folder")
        if isinstance(model.tokenizer, TokenizerSpec):
            problems.append("model.tokenizer: a tokenizer cannot be trained here; found: vocab_size; expected: a path")
        for key in ("revision", "pad_token"):
            if (value := getattr(model, key)) is not None:
                what = "download that revision and name its folder in model.path"
                why = what if key == "revision" else "PPO keeps lengths and needs no padding token; leave it out"
                problems.append(f"model.{key}: does nothing for ppo; found: {value!r}; {why}")
        return problems

    def _role_problems(self) -> list[str]:
        learner, problems = self.learner, []
        if not isinstance(learner.workers, int):
            problems.append(
                f"learner.workers: PPO cannot change its number of workers on the way yet; found: "
                f"{list(learner.workers)}; expected: one number"
            )
        if self.chunks_per_step < learner.max_workers:
            problems.append(
                f"learner.workers: {learner.max_workers} workers share the prompts of a step in whole chunks; found: "
                f"{self.chunks_per_step} chunks (ppo.batch_size {self.ppo.batch_size} / responses_per_prompt "
                f"{self.ppo.responses_per_prompt} = {self.ppo.prompts_per_step} prompts, rollout.chunk_prompts "
                f"{self.rollout.chunk_prompts}); expected: at least one each; lower rollout.chunk_prompts"
            )
        if learner.deepspeed is not None:
            problems += check_for_ppo(learner.deepspeed)
        problems += engine_problems(self.asked)
        if self.rollout.weight_transfer == "broadcast":
            problems += transfer_problems(self.rollout, self.learner)
        if "all" in self.report_to:
            problems.append("report_to: ppo needs trackers by name; found: 'all'; expected: for example [wandb]")
        return problems

    def _idle_settings(self) -> list[str]:
        """Settings that would do nothing. A default written out does no harm: config.yaml holds every value."""
        ppo, problems = self.ppo, []
        if self.eval is not None and self.data.eval is None:
            problems.append("eval: does nothing without data.eval; name the prompts to evaluate on, or leave eval out")
        if self.eval is None and self.data.eval is not None:
            problems.append("data.eval: does nothing with eval: null; leave out one of the two")
        if ppo.kl.target is None and ppo.kl.horizon != KlSection().horizon:
            problems.append(
                f"ppo.kl.horizon: does nothing without ppo.kl.target; found: {ppo.kl.horizon}; leave it out"
            )
        if ppo.max_lag == 0 and ppo.importance_cap != PpoSection().importance_cap:
            problems.append(
                f"ppo.importance_cap: does nothing with max_lag 0; found: {ppo.importance_cap}; leave it out"
            )
        return problems + _idle_lora(self.lora or {})


def _idle_lora(lora: Mapping[str, Any]) -> list[str]:
    """Only the adapters' own matrices learn and travel, and no forward pass of PPO has dropout."""
    idle = {"bias": "none", "modules_to_save": None, "trainable_token_indices": None, "lora_dropout": 0.0}
    return [
        f"lora.{key}: does nothing for ppo; found: {lora[key]!r}; leave it out"
        for key, default in idle.items()
        if key in lora and lora[key] != default
    ]
