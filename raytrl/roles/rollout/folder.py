"""A rollout engine whose weights are finished models on disk: what evaluation samples from."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

from raytrl.errors import WeightsVersionError
from raytrl.records.samples import Prompt, Response
from raytrl.roles.rollout.engine import RolloutEngine, Sampled, Turn, Wanted
from raytrl.roles.weights.buckets import Bucket, checksum, weights_on_disk


class FolderEngine(RolloutEngine):
    """Holds one of several models at a time; version v is the v-th of them.

    The weights that it is sent are `weights_on_disk`: every process reads the model itself, and the driver never has to.
    """

    def __init__(self, paths: Sequence[str], make: Callable[[int], RolloutEngine]) -> None:
        """`make(v)` loads the model at `paths[v]`."""
        super().__init__()
        self._paths, self._make = paths, make
        self._engine: RolloutEngine | None = None
        self._wanted = -1  # the version that is being loaded

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def begin_weights(self, version: int) -> None:
        super().begin_weights(version)
        self._wanted = version

    def _begin(self) -> None:
        pass

    def _take(self, bucket: Bucket) -> str:
        path = self._paths[self._wanted]
        if path not in bucket.tensors:
            raise WeightsVersionError(
                f"rollout engine: asked for {next(iter(bucket.tensors))!r}; found: {path!r} as model {self._wanted}"
            )
        self.close()  # before the next is loaded: there may be no room for two
        self._engine = self._make(self._wanted)
        self.concurrent = self._engine.concurrent
        (held,) = weights_on_disk(self._wanted, path).buckets
        return checksum(held)

    def _finish(self, version: int) -> None:
        pass

    def _generate(
        self, prompts: Sequence[Prompt], version: int, samples: int, greedy: bool, wanted: Wanted
    ) -> list[Response]:
        return self._held().responses(prompts, version, samples, greedy, wanted)

    def submit(self, turns: Sequence[Turn], version: int, greedy: bool, wanted: Wanted) -> "list[Future[Sampled]]":
        return self._held().submit(turns, version, greedy, wanted)

    def _logprobs(self, prompts: Sequence[Prompt], responses: Sequence[Response], version: int) -> list[float]:
        return self._held()._logprobs(prompts, responses, version)

    def _held(self) -> RolloutEngine:
        assert self._engine is not None
        return self._engine
