"""The driver's eye on a run: which failure is told, and that no event is lost on its way."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytrl.errors import RewardError, RunError, StalledError, WorkerError
from raytrl.launch.runs import watch
from raytrl.launch.runs.checkpoints import start_of
from raytrl.launch.runs.watch import Board, Watch, controller_of
from raytrl.launch.runs.worker import Heart, RayWorkerContext, _follows
from raytrl.records.progress import Progress
from raytrl.rundir import RunDirectory


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr(watch, "step_gauges", lambda run: SimpleNamespace(take=lambda event: None))
    run: Any = None
    return Board(run)


@pytest.fixture
def eye(tmp_path: Path) -> Watch:
    (tmp_path / "a").mkdir()
    run: Any = None
    return Watch(run, RunDirectory(str(tmp_path), "a"), None, {}, lambda event: None)


def test_an_answer_that_came_too_late_is_given_again(board: Board) -> None:
    steps = [Progress("step", step) for step in range(1, 6)]
    for event in steps[:3]:
        board.post(event)
    assert board.after(0) == steps[:3]  # and the driver had given up waiting for it
    board.post(steps[3])
    assert board.after(0) == steps[:4]
    board.post(steps[4])
    assert board.after(4) == steps[4:]
    assert board.after(5) == []


def test_attempts_count_up_whatever_the_clock_does(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([2_000, 1_000, 5_000])
    monkeypatch.setattr(watch.time, "time_ns", lambda: next(clock))
    assert [board.new_attempt() for _ in range(3)] == [2_000, 2_001, 5_000]


def test_words_of_a_peers_death_in_our_own_error_are_a_cause() -> None:
    assert not _follows(RewardError("judge: raised ConnectionError: connection reset by peer"))
    assert _follows(RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [10.0.0.2]"))
    assert _follows(AssertionError("DeepSpeed backend not set, please initialize it using init_process_group()"))
    assert not _follows(ValueError("a bad row"))


def test_the_cause_is_told_whoever_speaks_first(eye: Watch, tmp_path: Path) -> None:
    eye._handle(Progress("start", 0, 4))
    eye._handle(Progress("failure", text="worker 1: closed by peer", details="trace 1", follows=True))
    eye._handle(Progress("failure", text="worker 0: a bad row", details="trace 0"))
    assert str(eye._readable(RuntimeError("training failed"))).startswith("worker 0: a bad row;")
    log = (tmp_path / "a/failures.log").read_text()
    assert "trace 1" in log and "trace 0" in log


def test_a_failure_that_looks_like_a_peers_is_told_where_there_is_no_other(eye: Watch) -> None:
    """As of the very rank whose NCCL broke; it ends nothing before the cause had time to come."""
    eye._handle(Progress("failure", text="worker 1: NCCL error", follows=True))
    error = RuntimeError("training failed")
    error.worker_failures = {1: WorkerError("worker 1: NCCL error")}  # type: ignore[attr-defined]
    assert str(eye._readable(error)).startswith("worker 1: NCCL error;")
    died = RuntimeError("not healthy\nthe actor died")
    died.health_check_failure = RuntimeError()  # type: ignore[attr-defined]
    error.worker_failures[0] = died  # type: ignore[attr-defined]
    assert str(eye._readable(error)) == "worker 0: RuntimeError: not healthy"


def test_work_that_goes_on_is_told_once_in_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 1.0, 4.9, 5.0, 5.0, 6.0])
    monkeypatch.setattr("raytrl.launch.runs.worker.time", SimpleNamespace(monotonic=lambda: next(clock)))
    told: list[Progress] = []
    heart = Heart(told.append, 5.0)
    for _ in range(5):
        heart.beat()
    assert told == [Progress("beat")] * 2


def test_a_long_call_beats_until_it_ends() -> None:
    enough = threading.Event()
    told: list[Progress] = []

    def post(event: Progress) -> None:
        told.append(event)
        if len(told) == 3:
            enough.set()

    with pytest.raises(ValueError, match="of the call"), Heart(post, 0.001).beating():
        assert enough.wait(30)
        raise ValueError("of the call")
    count = len(told)
    assert not [thread for thread in threading.enumerate() if thread.name == "heart"]
    assert len(told) == count


def test_a_run_without_any_work_has_stalled(eye: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was told before: a beat puts the end off, and is not what was told last."""
    now = eye._last_event + 130.0  # the workers are still being placed
    events: list[Progress] = []
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now, time=lambda: 0.0))
    board = SimpleNamespace(after=SimpleNamespace(remote=lambda taken: events))
    monkeypatch.setattr(watch, "ray", SimpleNamespace(get=lambda answer, timeout: answer))
    eye._board, eye._run = board, SimpleNamespace(learner=SimpleNamespace(stall_timeout_s=20.0, start_timeout_s=120.0))  # type: ignore[assignment]
    record = Path(eye._run_dir.at("checkpoints/checkpoint_manager_snapshot.json"))
    record.parent.mkdir()
    record.write_text('{"checkpoint_results": []}')
    eye._take()
    assert (record.parent / "record-before.json").read_text() == record.read_text()
    eye._check_stall()
    now += 20.0
    with pytest.raises(
        StalledError, match=r"waited 140 s \(learner.start_timeout_s and learner.stall_timeout_s\).*none"
    ):
        eye._check_stall()
    now, events = 200.0, [Progress("step", 3, 9)]
    eye._take()
    now, events = 215.0, [Progress("beat")]
    eye._take()
    now, events = 234.0, []
    eye._take()
    eye._check_stall()
    now = 236.0
    with pytest.raises(StalledError, match=r"waited 20 s \(learner.stall_timeout_s\).*last told: step 3"):
        eye._check_stall()


def test_a_start_that_another_has_followed_stores_nothing(tmp_path: Path) -> None:
    """Through `ray://` the workers of a killed driver go on for half a minute."""
    run_dir = RunDirectory(str(tmp_path), "a")
    run_dir.update_manifest(started="then", starts=1)
    worker = RayWorkerContext.__new__(RayWorkerContext)
    worker.rank, worker._run_dir, worker._start = 0, run_dir, start_of(run_dir)
    worker._refuse_later_start()
    run_dir.update_manifest(state="running")
    worker._refuse_later_start()
    run_dir.update_manifest(starts=2)
    with pytest.raises(RunError, match="was started again meanwhile"):
        worker._refuse_later_start()
    run_dir.clear()
    with pytest.raises(RunError, match="was started again meanwhile"):
        worker._refuse_later_start()


class Fitting:
    """Stands for a trainer whose fit() waits for its controller."""

    def __init__(self) -> None:
        self.starts, self.gone, self.ended = threading.Event(), threading.Event(), False

    def fit(self) -> None:
        self._initialize_and_run_controller()

    def _initialize_and_run_controller(self) -> None:
        self.starts.wait(60)
        controller = self  # the name that Ray Train has for it
        controller.gone.wait(60)
        self.ended = True
        raise RuntimeError("the actor died")


@pytest.mark.parametrize("has_started", [False, True])
def test_a_fit_that_nobody_waits_for_is_ended(eye: Watch, monkeypatch: pytest.MonkeyPatch, has_started: bool) -> None:
    """Else Ray is shut down under its thread: a process that was interrupted ended by a segmentation fault now and then."""
    trainer = Fitting()

    def interrupted() -> None:
        (thread,) = (each for each in threading.enumerate() if each.name == "ray-train-fit")
        if has_started:
            trainer.starts.set()
        while has_started and controller_of(thread) is None:
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", lambda seconds: trainer.starts.set())  # only `_end` waits so
    monkeypatch.setattr(eye, "_take", interrupted)
    monkeypatch.setattr(watch.ray, "kill", lambda controller: controller.gone.set())
    with pytest.raises(KeyboardInterrupt):
        eye.until_done(trainer)
    assert trainer.ended
    assert "ray-train-fit" not in [thread.name for thread in threading.enumerate()]


def test_ray_train_has_these_names() -> None:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    assert "controller" in DataParallelTrainer._initialize_and_run_controller.__code__.co_varnames
