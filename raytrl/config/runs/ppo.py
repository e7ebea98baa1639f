"""The run file of `raytrl ppo`: its sections, and what must agree between them."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from raytrl.config.foreign.deepspeed import check_for_ppo
from raytrl.config.runs.base import ModelUse, Processes, TrainingRun, or_raise
from raytrl.config.runs.rollout import RolloutRun
from raytrl.config.sections.algorithms import defaults_of
from raytrl.config.sections.engines import Asked, chosen_engine, engine_problems, holds_several_versions
from raytrl.config.sections.model import TokenizerSpec
from raytrl.config.sections.ppo import EvalSection, KlSection, PpoSection, ValueModelSection
from raytrl.config.sections.weight_transfer import chosen_transfer, transfer_problems

_AGES = ("rollout/lag_mean", "rollout/lag_max", "rollout/redone_newer")
_OF_OLDER = (*_AGES, "importance/ess", "rollout/kl_to_sampler")
_OF_WEIGHTS = ("importance/mean", "importance/capped_fraction")
# A schedule of so many versions side by side is as fast as one without any bound.
_ENOUGH_LAG = 3
# Keys of `ppo` that act on ratios other than 1.
_OF_RATIOS = ("clip_range", "clip_range_high", "ratio", "ratio_limit", "loss")


class PpoRun(TrainingRun, RolloutRun):
    """PPO: learner workers on Ray Train, rollout and reward actors beside them."""

    launcher: ClassVar[str] = "raytrl.launch.runs.ppo:PpoKind"
    row_checks: ClassVar[str] = "raytrl.plan.checks.ppo:try_data"
    task: ClassVar[str] = "proximal policy optimisation (PPO)"
    step_name: ClassVar[str] = "PPO steps"

    kind: Literal["ppo"] = "ppo"
    """PPO or one of its kin without a critic, against reward models, rules or endpoints."""
    ppo: PpoSection = PpoSection()
    """The algorithm: how responses and their scores become updates."""
    value_model: ValueModelSection = ValueModelSection()
    """The value function: what it starts from."""
    eval: EvalSection | None = None
    """Responses on data.eval, scored by the same sources. Left out: on where there is data.eval. null: none."""

    @property
    def asked(self) -> Asked:
        return Asked(self.rollout, [str(self.model.path)], self.lora, elsewhere=self._elsewhere)

    @property
    def chunks_per_step(self) -> int:
        """Pieces that a step's prompts are sampled in."""
        return -(-self.ppo.prompts_per_step // self.rollout.chunk_prompts)

    @property
    def prompts_at_a_time(self) -> int:
        return self.ppo.prompts_per_step

    @property
    def samples_a_prompt(self) -> int:
        return self.ppo.responses_per_prompt

    @property
    def responses_a_step(self) -> int:
        return self.ppo.candidates * self.ppo.batch_size

    @property
    def engine_versions(self) -> int:
        if self.rollout.versions is not None:
            return self.rollout.versions
        lag = self.ppo.max_lag
        return lag + 1 if lag > 1 and holds_several_versions(self.asked) else 1

    @property
    def lanes(self) -> int:
        return self.ppo.lanes(self.engine_versions)

    @property
    def lane_groups(self) -> int:
        return -(-self.lanes // self.engine_versions)

    @property
    def has_critic(self) -> bool:
        """Whether a value function is learned, and stored."""
        return self.ppo.has_critic

    @property
    def has_value_model(self) -> bool:
        """Whether the value function is a network of its own, or an adapter."""
        return self.has_critic and not self.value_model.shared

    @property
    def has_reference(self) -> bool:
        """Whether log-probs of a reference are needed: for the penalty, or for the metric of who names one."""
        return self.ppo.kl.coef > 0 or self.reference.path is not None

    def origin_of_default(self, key: str) -> str:
        is_from_algorithm = key.removeprefix("ppo.") in defaults_of(self.ppo.algorithm) and key.startswith("ppo.")
        return f"from algorithm: {self.ppo.algorithm}" if is_from_algorithm else super().origin_of_default(key)

    @property
    def loads_whole_models(self) -> bool:
        return self.lora is None

    @property
    def travelling_model(self) -> str | None:
        return self.model.path if self.lora is None else None

    def microbatch_tokens(self, token_bytes: float) -> int:
        """Tokens in one forward pass of the learner, as `PpoLearner` chooses them, see `PpoSection.microbatch_tokens`."""
        rows = -(-self.ppo.batch_size // self.learner.max_workers)
        if self.ppo.candidates > 1:  # which may all lie in one worker
            rows = self.ppo.batch_size
        tokens = self.ppo.microbatch_tokens(token_bytes, self.learner.uses_gpu)
        return min(max(tokens, self.longest_row), rows * self.longest_row)

    def processes(self) -> tuple[Processes, ...]:
        learner = self.learner
        own = Processes("learner.workers", "learner", learner, learner.max_workers, learner.max_workers)
        return (*super().processes(), own)

    def models(self) -> tuple[ModelUse, ...]:
        learner = ("learner.workers",)
        others = [("value_model.init", self.value_model.init), ("reference.path", self.reference.path)]
        return (
            self._use("model.path", str(self.model.path), ("learner.workers", "rollout.actors")),
            *(self._use(key, path, learner, key == "value_model.init") for key, path in others if path is not None),
            *self._reward_models(),
        )

    def steps(self, rows: Mapping[str, int]) -> int:
        return self.ppo.steps

    def why_never_evaluated(self) -> tuple[str, str] | None:
        if self.eval is not None and self.eval.every > self.ppo.steps:
            return (
                f"eval.every {self.eval.every}, more than ppo.steps {self.ppo.steps}, so never,",
                f"at most {self.ppo.steps}",
            )
        return super().why_never_evaluated()

    def why_without(self, metric: str) -> tuple[str, str, str] | None:
        of_reward = ("objective/rlhf_reward", "objective/non_score_reward")
        if metric.startswith("objective/kl") or metric in of_reward:
            if not self.has_reference:
                return "is measured against a reference", "ppo.kl.coef 0, without one,", "more, or a reference.path"
            if metric in of_reward and self.ppo.kl.place == "loss":
                return "counts a KL in the reward", "ppo.kl.place loss", "reward"
        if metric == "loss/kl_avg" and (self.ppo.kl.place == "reward" or self.ppo.kl.coef == 0):
            return "is of a KL in the loss", f"ppo.kl.place {self.ppo.kl.place}, coef {self.ppo.kl.coef:g}", "both"
        if metric.startswith("groups/") and self.ppo.responses_per_prompt == 1:
            return "is of several responses to a prompt", "ppo.responses_per_prompt 1", "2 or more"
        if metric in _OF_OLDER and not self.ppo.max_lag and (metric in _AGES or self.ppo.importance is None):
            return "is of samples that are ahead", "ppo.max_lag 0", "1 or more"
        if metric in _OF_WEIGHTS and self.ppo.importance is None:
            return "is of weighted samples", "ppo.importance null", "a section"
        if metric in ("loss/value_avg", "val/explained_variance", "val/clipfrac_avg") and not self.has_critic:
            return "is of a value function", f"ppo.advantage {self.ppo.advantage}, without one,", "critic"
        return super().why_without(metric)

    def in_words(self, rows: Mapping[str, int], microbatch: int | None) -> list[tuple[str, str]]:
        ppo, prompts, workers = self.ppo, self.ppo.prompts_per_step, self.learner.max_workers
        ways = {"object_store": "through the object store", "broadcast": "by broadcast ({}) to all engines"}
        way = ways[self.rollout.weight_transfer].format("NCCL" if self.learner.uses_gpu else "gloo")
        learners = "one learner worker" if workers == 1 else f"{workers} learner workers"
        words = [
            ("training", self.how_trained),
            ("algorithm", self._algorithm_in_words()),
            self._rewards_in_words(),
            self._engine_in_words(),
            *self._tools_in_words(),
            ("weights", f"{way}, at each step"),
            *self._lag_in_words(),
            (
                "step",
                f"{self.responses_a_step} responses, {self.samples_a_prompt} to each of {prompts} prompts, over {learners}"
                + (f"; learned from: {ppo.batch_size}, of prompts whose scores differ" if ppo.candidates > 1 else ""),
            ),
            (
                "update",
                f"{ppo.epochs * ppo.minibatches} optimizer steps = {ppo.epochs} epochs x {ppo.minibatches} minibatches of "
                f"{ppo.batch_size // ppo.minibatches} responses",
            ),
            ("KL", self._kl_in_words()),
        ]
        if microbatch is not None:
            tokens, row = microbatch, self.longest_row
            fit = "one row" if tokens // row == 1 else f"{tokens // row} rows"
            sentence = f"{tokens:,} tokens a forward pass: {fit} of at most {row} tokens, or more that are shorter"
            words.append(("microbatch", sentence))
        count, all_prompts = rows.get("data.train"), ppo.steps * prompts
        share = f" = {all_prompts / count:.2g} epochs of {count:,} prompts" if count else ""
        words.append(
            ("steps", f"{ppo.steps:,}; {ppo.steps * self.responses_a_step:,} responses, {all_prompts:,} prompts{share}")
        )
        return words

    def _algorithm_in_words(self) -> str:
        against = {
            "critic": "a value function's estimate",
            "group_mean": f"the mean of the {self.samples_a_prompt} responses to its prompt",
            "leave_one_out": f"the mean of the other {self.samples_a_prompt - 1} to its prompt",
            "none": "nothing",
        }
        ppo = self.ppo
        scaled = {"none": "", "group": ", divided by their deviation", "batch": ", divided by the batch's deviation"}
        value = "" if self.has_critic else "; no value function"
        value = "; its value function is a head on the policy" if self.value_model.shared else value
        return f"{ppo.algorithm}: a response against {against[ppo.advantage]}{scaled[ppo.advantage_scale]}{value}"

    def _lag_in_words(self) -> list[tuple[str, str]]:
        lag, versions, groups = self.ppo.max_lag, self.engine_versions, self.lane_groups
        if not lag:
            return []
        batches = "one batch is" if lag == 1 else f"{lag} batches are"
        where = "" if lag == 1 else f"; engines hold {versions} versions side by side" if versions > 1 else ""
        where += f"; {groups} groups of actors take turns" if groups > 1 else ""
        weights = "samples count by their own weight" if self.ppo.importance else "samples are not weighted"
        return [("ahead", f"{batches} sampled ahead: step s learns from version s - {lag}; {weights}{where}")]

    def _kl_in_words(self) -> str:
        kl = self.ppo.kl
        if kl.coef == 0:
            return "no penalty" + ("" if self.has_reference else ", no reference model")
        return f"in the {kl.place}, coefficient {kl.coef:g}" + (f", target {kl.target:g}" if kl.target else "")

    def idle_settings(self, steps: int | None) -> list[str]:
        lines, ppo = super().idle_settings(steps), self.ppo
        if self.eval is not None and self.eval.every > ppo.steps:
            lines.append(f"eval.every: {self.eval.every}, and the run has {ppo.steps} steps: it would never evaluate")
        if self.reference.path is not None and ppo.kl.coef == 0:
            lines.append("reference.path: changes only the metric objective/kl, as ppo.kl.coef is 0")
        if self.has_critic and ppo.value_coef == 0:
            lines.append("ppo.value_coef: is 0: the value function would never learn")
        plain = PpoSection()
        meant = {key for key in ppo.model_fields_set if getattr(ppo, key) != getattr(plain, key)}
        meant |= set(defaults_of(ppo.algorithm)) | ({"clip_range"} if self.has_critic else set())
        if ppo.is_one_step and (keys := [key for key in _OF_RATIOS if key in meant]):
            named, act = ", ".join(f"ppo.{key}" for key in keys), "act" if len(keys) > 1 else "acts"
            lines.append(f"{named}: {act} on nothing: with one optimizer step a batch the ratio is always 1")
        if ppo.max_lag > _ENOUGH_LAG and self.engine_versions > ppo.max_lag:
            lines.append(
                f"ppo.max_lag: {ppo.max_lag}: with {_ENOUGH_LAG} nobody waits for anybody, and more only makes samples older"
            )
        groups, actors = self.lane_groups, self.rollout.actors
        if actors % groups or self.lanes % groups:
            lines.append(
                f"rollout.actors: {actors} are dealt to {groups} groups that make {self.lanes} batches in turn: some have more "
                f"to do than others, and all wait for these"
            )
        if ppo.max_lag and ppo.importance is None:
            lines.append("ppo.importance: null, so samples of older weights count as if they were of today's")
        own = defaults_of(ppo.algorithm).get("advantage", "critic")
        if ppo.advantage != own:
            lines.append(
                f"ppo.algorithm: {ppo.algorithm} compares with {own} by itself, and ppo.advantage says {ppo.advantage}"
            )
        return lines + self._idle_actors()

    def savings(self) -> Iterator[Mapping[str, Any]]:
        yield {"ppo.max_tokens_per_microbatch": self.longest_row}
        yield {"rollout.chunk_prompts": 1}
        yield from super().savings()

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
        or_raise(
            self._model_problems() + self._reward_problems() + self._role_problems() + self._useless_settings(), None
        )
        self.__dict__["rollout"] = self.rollout.chosen(versions=self.engine_versions)
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
        times = f" x candidates {self.ppo.candidates}" if self.ppo.candidates > 1 else ""
        if not isinstance(learner.workers, int):
            problems.append(
                f"learner.workers: PPO cannot change its number of workers on the way yet; found: "
                f"{list(learner.workers)}; expected: one number"
            )
        if self.chunks_per_step < learner.max_workers:
            problems.append(
                f"learner.workers: {learner.max_workers} workers share the prompts of a step in whole chunks; found: "
                f"{self.chunks_per_step} chunks (ppo.batch_size {self.ppo.batch_size}{times} / responses_per_prompt "
                f"{self.ppo.responses_per_prompt} = {self.ppo.prompts_per_step} prompts, rollout.chunk_prompts "
                f"{self.rollout.chunk_prompts}); expected: at least one each; lower rollout.chunk_prompts"
            )
        if learner.deepspeed is not None:
            problems += check_for_ppo(learner.deepspeed)
        problems += engine_problems(self.asked) + self._lane_problems()
        if self.rollout.weight_transfer == "broadcast":
            problems += transfer_problems(self.rollout, self.learner)
        if "all" in self.report_to:
            problems.append("report_to: ppo needs trackers by name; found: 'all'; expected: for example [wandb]")
        return problems

    def _lane_problems(self) -> list[str]:
        lag, versions, actors = self.ppo.max_lag, self.rollout.versions, self.rollout.actors
        problems = []
        if versions is not None and versions > lag + 1:
            problems.append(
                f"rollout.versions: with ppo.max_lag {lag} no more than {lag + 1} can be asked for at a time; found: "
                f"{versions}; leave it out"
            )
        elif (versions or 1) > 1 and holds_several_versions(self.asked) is False:
            problems.append(
                f"rollout.versions: vllm holds one version of this policy, and several only of adapters (lora) where its class "
                f"for the model, and their options, allow it; found: {versions}; expected: 1, and a rollout actor for each of "
                f"ppo.max_lag {lag} batches, or rollout.engine: transformers"
            )
        elif actors < self.lane_groups:
            held = f"an engine holds {self.engine_versions} of them"
            problems.append(
                f"rollout.actors: ppo.max_lag {lag} has batches of {lag} versions on their way, and {held}; found: {actors}; "
                f"expected: at least {self.lane_groups}, or a max_lag of at most {actors * self.engine_versions}"
            )
        return problems

    def _useless_settings(self) -> list[str]:
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
        return problems + self._of_another_algorithm() + _idle_lora(self.lora or {})

    def _of_another_algorithm(self) -> list[str]:
        ppo, plain, problems = self.ppo, PpoSection(), list[str]()

        def idle(keys: tuple[str, ...], why: str) -> None:
            for key in keys:
                if (found := getattr(ppo, key)) != getattr(plain, key):
                    problems.append(f"ppo.{key}: does nothing {why}; found: {found}; leave it out")

        if not self.has_critic:
            idle(("value_learning_rate", "value_clip_range", "value_coef", "lam"), f"with advantage {ppo.advantage}")
            for key, found in (("init", self.value_model.init), ("shared", self.value_model.shared)):
                if found:
                    problems.append(
                        f"value_model.{key}: there is no value function with advantage {ppo.advantage}; found: {found}; "
                        f"leave it out"
                    )
        if ppo.in_groups:
            idle(("gamma",), f"with advantage {ppo.advantage}, one number a response")
        if ppo.loss == "cispo":
            idle(("clip_range", "clip_range_high"), "with loss cispo, which has ratio_limit")
        return problems


def _idle_lora(lora: Mapping[str, Any]) -> list[str]:
    """Only the adapters' own matrices learn and travel, and no forward pass of PPO has dropout."""
    idle = {"bias": "none", "modules_to_save": None, "trainable_token_indices": None, "lora_dropout": 0.0}
    return [
        f"lora.{key}: does nothing for ppo; found: {lora[key]!r}; leave it out"
        for key, default in idle.items()
        if key in lora and lora[key] != default
    ]
