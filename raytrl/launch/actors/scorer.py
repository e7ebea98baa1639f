"""The loop's `Scorer` on a pool of reward actors, one in every learner worker."""

from collections.abc import Callable, Sequence
from typing import Any

from raytrl.config.runs.rollout import RolloutRun
from raytrl.config.sections.reward import RewardSection
from raytrl.config.sections.rollout import RolloutSection
from raytrl.launch.actors.calls import RayCalls
from raytrl.launch.actors.pool import Pool, Request
from raytrl.launch.session.gauges import RoleGauges
from raytrl.records.samples import Attempt, Prompt, Response, Score
from raytrl.roles.reward.call import Pair, longest_call_s
from raytrl.roles.reward.sources import check_dropped, check_failed

Gather = Callable[[Sequence[Score]], Sequence[Score]]


class PoolScorer:
    """`loop.protocols.Scorer` on reward actors."""

    def __init__(
        self,
        pool: Pool,
        section: RewardSection,
        *,
        attempt: Attempt,
        rollout: RolloutSection,
        gather: Gather,
    ) -> None:
        """
        Args:
            gather: the scores of all workers, on every worker; collective.
        """
        self._pool, self._section, self._attempt, self._gather = pool, section, attempt, gather
        self._rollout, self._started, self._sent = rollout, False, 0
        self._prompts: Sequence[Prompt] = ()
        self._by_row: dict[int, Prompt] = {}

    def submit(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> None:
        self.start()
        if (
            prompts is not self._prompts
        ):  # a batch comes in many chunks: to index it for each would grow with its square
            self._prompts, self._by_row = prompts, {prompt.row: prompt for prompt in prompts}
        pairs: list[Pair] = [(self._by_row[response.row], response) for response in responses]
        first = responses[0]
        name = f"scores of rows {first.row} to {responses[-1].row} of step {first.step}"
        self._pool.send(Request(name, self._sent, "score", (self._attempt, pairs)))
        self._sent += 1

    def start(self) -> None:
        """Returns when the actors have loaded their sources."""
        if not self._started:
            self._pool.prepare_all("prepare", self._attempt, timeout_s=self._rollout.start_timeout_s)
            self._started = True

    def collect(self) -> list[Score]:
        scores = [score for _, answer in self._pool.answers() for score in answer]
        if (
            self._section.on_error == "drop" or self._rollout.converses
        ):  # judged over the step's batch, whoever scored it
            all_scores = self._gather(scores)
            check_failed(all_scores, self._rollout.max_failed_fraction)
            check_dropped(all_scores, self._section.drop_budget)
        return scores


def scorer_on(
    handles: Sequence[Any],
    run: RolloutRun,
    *,
    who: str,
    attempt: Attempt,
    gather: Gather,
    beat: Callable[[], None] = lambda: None,
) -> PoolScorer:
    """The scorer of a learner worker, or of an evaluation, on these reward actors; `who` is it, for messages; `beat`: see
    `Pool`."""
    limit_s = scoring_limit_s(run)
    return PoolScorer(
        Pool(RayCalls(handles, RoleGauges(run.name, "reward").part()), "reward actors", who, limit_s, beat=beat),
        run.reward,
        attempt=attempt,
        rollout=run.rollout,
        gather=gather,
    )


def scoring_limit_s(run: RolloutRun) -> float:
    """A reward actor's sources have limits of their own, and it may have other workers' chunks first: the pool's limit must
    not come before them."""
    responses = run.rollout.chunk_prompts * run.samples_a_prompt
    slowest = max(
        (longest_call_s(source, responses) for source in run.reward.sources), default=0.0
    )  # asked side by side
    at_a_time = run.prompts_at_a_time or run.rollout.chunk_prompts
    chunks = -(-at_a_time // run.rollout.chunk_prompts)
    return run.rollout.timeout_s + slowest * -(-chunks // run.reward.actors)
