"""A rollout engine whose weights are finished models on disk: what evaluation samples from."""

from collections.abc import Callable, Sequence

from raytrl.errors import WeightsVersionError
from raytrl.records import Prompt, Response
from raytrl.roles.rollout import RolloutEngine
from raytrl.roles.weights import Weights


class FolderEngine(RolloutEngine):
    """Holds one of several models at a time; version v is the v-th of them.

    The weights that it is sent carry no tensors, only the version and, for checksum, the model's path: every process
    reads the model itself, and the driver never has to.
    """

    def __init__(self, paths: Sequence[str], make: Callable[[int], RolloutEngine]) -> None:
        """`make(v)` loads the model at `paths[v]`."""
        super().__init__()
        self._paths, self._make = paths, make
        self._engine: RolloutEngine | None = None

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _load(self, weights: Weights) -> None:
        if self._paths[weights.version] != weights.checksum:
            raise WeightsVersionError(
                f"rollout engine: asked for {weights.checksum!r}; found: {self._paths[weights.version]!r} as model "
                f"{weights.version}"
            )
        self.close()  # before the next is loaded: there may be no room for two
        self._engine = self._make(weights.version)
        self.concurrent = self._engine.concurrent

    def _generate(self, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool) -> list[Response]:
        return self._held()._generate(prompts, version, samples, greedy)

    def _logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response]) -> list[float]:
        return self._held()._logprobs(prompts, responses)

    def _held(self) -> RolloutEngine:
        assert self._engine is not None
        return self._engine
