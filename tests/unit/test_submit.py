"""What is checked before a job is sent, and how secrets are referred to."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import yaml

from raytrl.config.load import load_run
from raytrl.errors import ConfigError, RunError
from raytrl.launch.jobs import jobs
from raytrl.launch.jobs.package import check_files, package_of
from raytrl.launch.session import secrets
from raytrl.launch.session.session import check_output_dir
from tests.runs import TINY_LLAMA, text_rows, write_rows


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run file that can be sent."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    write_rows(folder / "data/train.jsonl", text_rows(8))
    (folder / ".gitignore").write_text("large/\n*.log\n")
    (folder / "large").mkdir()
    (folder / "large/model.bin").write_bytes(b"0" * 5000)
    (folder / "data/.gitignore").write_text("private.jsonl\n")
    (folder / "data/private.jsonl").write_text("{}")
    (folder / "here.log").write_text("log")
    (folder / ".git").mkdir()
    (folder / ".git/HEAD").write_text("ref")
    values = {
        "kind": "sft",
        "name": "a",
        "output_dir": "/shared/runs",
        "model": {"config": TINY_LLAMA, "tokenizer": {"vocab_size": 300}},
        "data": {"train": "data/train.jsonl"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(folder)
    return folder


def refusal(*words: str, env: list[str] | None = None, secret: list[str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        jobs.prepare(words, env or [], secret or [])
    return str(caught.value)


def test_what_git_ignores_is_not_sent(project: Path) -> None:
    package = package_of(".")
    assert set(package.files) == {".gitignore", "run.yaml", "data/.gitignore", "data/train.jsonl"}
    assert str(package) == f"{project}: 4 files, 0.0 MiB"


def test_a_request_that_can_be_sent(project: Path) -> None:
    found = jobs.prepare(["sft", "run.yaml", "training.learning_rate=1e-4", "--fresh"], ["A=1"], ["T", "U=/s/u"])
    assert found.command == ("raytrl", "sft", "run.yaml", "training.learning_rate=1e-4", "--fresh")
    variables = found.runtime_env["env_vars"]
    assert (variables["A"], variables["RAYTRL_SECRETS"]) == ("1", "T,U=/s/u")
    assert found.runtime_env["worker_process_setup_hook"] == "raytrl.launch.session.secrets.load_secrets"
    again = jobs.prepare(["sft", "run.yaml"], [], ["T"])
    assert again.run_key == found.run_key
    assert "worker_process_setup_hook" not in again.runtime_env
    assert jobs.prepare(["sft", "run.yaml", "name=b"], [], []).run_key != found.run_key


def test_a_directory_that_is_too_large_names_its_largest_files(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.runtime_env import packaging

    monkeypatch.setattr(packaging, "GCS_STORAGE_MAX_SIZE", 4 * 2**20)
    (project / "model.bin").write_bytes(b"0" * 5 * 2**20)
    assert "found: " in (text := refusal("sft", "run.yaml"))
    assert "5 files, 5.0 MiB; Ray takes less than 4 MiB; largest: model.bin (5 MiB), " in text


def test_what_is_wrong_with_the_command(project: Path) -> None:
    assert "nearest known key: learning_rate" in refusal("sft", "run.yaml", "training.learning_rat=1")
    assert "output_dir: would be lost" in refusal("sft", "run.yaml", "output_dir=runs")
    assert "expected: one of sft" in refusal("python", "train.py")
    assert "expected: one of sft" in refusal("sft")
    text = refusal("sft", "run.yaml", "output_dir=s3://me:passw0rd@bucket/runs")
    assert text.startswith("output_dir: holds a password")
    assert "passw0rd" not in text


def test_files_that_would_be_missing_in_the_job(project: Path) -> None:
    (project.parent / "outside.jsonl").write_text("{}")
    assert "'large/model.bin' is not sent with the job: .gitignore" in refusal(
        "sft", "run.yaml", "data.train={path: json, data_files: large/model.bin}"
    )
    assert "data.train.data_files: '../outside.jsonl' is outside" in refusal(
        "sft", "run.yaml", "data.train=../outside.jsonl"
    )
    (project / "rows.log").write_text("def rows(x): return x")
    (project / "rows.py").write_text("def rows(x): return x")
    (project / ".gitignore").write_text("rows.py\n")
    source = "data.train={path: json, data_files: data/train.jsonl, transform: rows.py:rows}"
    assert "data.train.transform: 'rows.py' is not sent" in refusal("sft", "run.yaml", source)
    (project / ".gitignore").write_text("run.yaml\n")
    assert "'run.yaml' is not sent" in refusal("sft", "run.yaml")


def test_paths_that_are_only_on_the_cluster_are_fine(project: Path) -> None:
    check_files(load_run("run.yaml", ["data.train=/shared/train.jsonl", "data.eval=some/hub-id"]), package_of("."))


def test_variables_and_secrets(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIN", "x")
    assert secrets.environment(["PLAIN", "B=c=d"]) == {"PLAIN": "x", "B": "c=d"}
    assert "is not set here" in refusal("sft", "run.yaml", env=["NOT_SET"])
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DB_PASSWORD"):
        text = refusal("sft", "run.yaml", env=[f"{name}=v4lue"])
        assert f"--env {name}: is named like a secret" in text
        assert "v4lue" not in text
    assert "KEYBOARD" in secrets.environment(["KEYBOARD=us"])
    text = refusal("sft", "run.yaml", secret=["HF_TOKEN=v4lue"])
    assert "--secret HF_TOKEN: not a reference" in text
    assert "v4lue" not in text


def test_secrets_are_read_where_the_process_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text("hidden\n")
    monkeypatch.setenv("HERE", "too")
    monkeypatch.setenv("FROM_FILE", "old")
    monkeypatch.setenv("RAYTRL_SECRETS", f"HERE,FROM_FILE={file}")
    secrets.load_secrets()
    assert os.environ["FROM_FILE"] == "hidden"
    monkeypatch.setenv("RAYTRL_SECRETS", "NOT_HERE")
    with pytest.raises(ConfigError, match="--secret NOT_HERE: is not in the environment"):
        secrets.load_secrets()
    monkeypatch.setenv("RAYTRL_SECRETS", f"GONE={tmp_path}/gone")
    with pytest.raises(ConfigError, match=r"--secret GONE: cannot be read on .*: No such file"):
        secrets.load_secrets()


class _Gone:
    """A job server that ends after it was found."""

    def __getattr__(self, name: str) -> Any:
        def ask(*_: Any, **__: Any) -> None:
            raise requests.exceptions.ConnectionError("refused")

        return ask


def test_a_job_server_that_is_gone_is_one_line(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"_STATUS_S": 0, "_STOP_WAIT_S": 0, "_ASK_S": 0.0}.items():
        monkeypatch.setattr(jobs, name, seconds)
    submission, client = jobs.prepare(["sft", "run.yaml"], [], []), _Gone()
    calls: dict[str, Callable[[Any], Any]] = {
        "the cluster did not list its jobs: refused; submit again": lambda client: jobs.job_of(client, submission),
        "the cluster did not take the job: refused; submit again": lambda client: jobs.submit(client, submission),
        "waited 0 s for Ray to say how sft-a ended": lambda client: jobs.outcome(client, "sft-a"),
        "sft-a could not be asked to stop, and goes on: refused; ray job stop sft-a": lambda client: jobs.stop(
            client, "sft-a"
        ),
    }
    for words, call in calls.items():
        with pytest.raises(RunError, match=f"^submit: {words}"):
            call(client)


def test_a_dashboard_that_starts_again_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_ASK_S", 0.0)
    answers = [
        requests.exceptions.ConnectionError(),
        "RUNNING",
        RuntimeError("Request failed with status code 503"),
        "SUCCEEDED",
    ]

    class Restarting:
        def get_job_info(self, job: str) -> Any:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return SimpleNamespace(status=answer)

    client: Any = Restarting()
    assert jobs.outcome(client, "sft-a") == (0, "")
    assert answers == []


def test_a_job_refuses_results_inside_its_copy(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run("run.yaml", ["output_dir=runs"]).run
    check_output_dir(run)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://x.zip"}}')
    with pytest.raises(ConfigError, match="output_dir: would be lost"):
        check_output_dir(run)
    check_output_dir(load_run("run.yaml", []).run)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {}, "metadata": {}}')
    check_output_dir(run)
