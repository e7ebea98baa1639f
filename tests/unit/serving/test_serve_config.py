"""Run files of `raytrl serve`: what is served of a place, and what is refused before anything starts."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrl.config.load import load_run
from raytrl.config.runs.serve import ServeRun
from raytrl.errors import ConfigError, ResourceError
from raytrl.launch.session.secrets import values_at
from raytrl.plan.capacity import Room, check_memory
from raytrl.plan.checks.serve import check_port, check_serve
from raytrl.plan.cluster import Cluster, Node
from raytrl.plan.need import need_of
from raytrl.plan.shapes import read_shapes
from tests.ppo_files import make_policy
from tests.unit.reward.conftest import save_classifier


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_policy(folder, head_size=32)
    save_classifier(folder / "reward")
    return folder


def _run_dir(
    folder: Path, models: Path, model: str = "policy", kind: str = "ppo", state: str = "done", at: str = "model"
) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"kind": kind, "state": state}))
    (folder / at).parent.mkdir(exist_ok=True)
    (folder / at).symlink_to(models / model)
    return folder


def _loaded(place: Path | str, *overrides: str) -> ServeRun:
    run = load_run(str(place), list(overrides), "serve").run
    assert isinstance(run, ServeRun)
    return run


def test_a_run_is_served_under_its_name_and_beside_itself(tmp_path: Path, models: Path) -> None:
    run = _loaded(_run_dir(tmp_path / "my-ppo", models))
    assert (run.served_name, run.name, run.output_dir) == ("my-ppo", "serve-my-ppo", str(tmp_path))
    assert run.model_path == str(tmp_path / "my-ppo/model")
    assert not run.scores


def test_the_model_says_what_it_is_not_the_run(tmp_path: Path, models: Path) -> None:
    """A sweep's best may be either."""
    assert _loaded(_run_dir(tmp_path / "sweep", models, "reward", kind="tune")).scores
    assert not _loaded(_run_dir(tmp_path / "other", models, "policy", kind="tune")).scores


def test_a_folder_with_a_model_serves_too_and_a_file_says_more(tmp_path: Path, models: Path) -> None:
    assert _loaded(models / "policy").served_name == "policy"
    file = tmp_path / "serve.yaml"
    serve = {"name": "film", "port": 9000, "replicas": 2}
    file.write_text(yaml.safe_dump({"kind": "serve", "run": str(models / "policy"), "name": "mine", "serve": serve}))
    run = _loaded(file, "serve.replicas=3")
    assert (run.served_name, run.name, run.serve.port, run.serve.replicas) == ("film", "mine", 9000, 3)


def test_of_a_lora_run_the_merged_model_is_served(tmp_path: Path, models: Path) -> None:
    run = tmp_path / "lora"
    _run_dir(run, models, at="model/merged")
    (run / "model/adapter_config.json").write_text("{}")
    assert _loaded(run).model_path == str(run / "model/merged")


def test_a_folder_is_no_run_file_of_another_kind(models: Path) -> None:
    with pytest.raises(ConfigError, match="no such run file"):
        load_run(str(models / "policy"), [], "sft")


@pytest.mark.parametrize(
    ("kind", "state", "words"), [("eval", "done", "no model of its own"), ("ppo", "running", "not finished")]
)
def test_what_has_no_finished_model_is_refused(tmp_path: Path, models: Path, kind: str, state: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _loaded(_run_dir(tmp_path / "a", models, kind=kind, state=state))


@pytest.mark.parametrize(("place", "words"), [("gone", "no such run file"), ("s3://a/b", "no such run file")])
def test_a_place_that_is_not_there_is_refused(place: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        _loaded(place)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("serve.host=0.0.0.0", "whoever reaches that address"),
        ("serve.host='::'", "whoever reaches that address"),
        ("serve.host=10.0.0.1", "whoever reaches that address"),
        ("serve.api_key=sk-123456", "holds a secret"),
        ("serve.api_key=hf_abcdef", "holds a secret"),
        ("serve.api_key='NAME=relative'", "holds a secret"),
        ("serve.port=0", "greater than or equal to 1"),
        ("serve.route=mine", "expected: / or a path"),
        ("serve.route=/mine/", "expected: / or a path"),
        ("serve.name='a b'", "letters, digits"),
        ("serve.adapters={policy: x}", "the model itself has that name"),
        ("serve.label=1", "does nothing for a policy"),
        ("serve.placement=spread", "Ray Serve places replicas by itself"),
        ("serve.engine_args.modle=1", "unknown key"),
        ("serve.engine_args.enable_lora=true", "is set by"),
        ("serve.max_ongoin=1", "max_ongoing"),
        ("serve.max_n=0", "greater than 0"),
        ("rollout.engine=vllm", "unknown key"),
    ],
)
def test_wrong_settings_are_refused_and_secrets_not_repeated(models: Path, override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        _loaded(models / "policy", override)
    for secret in ("sk-123456", "hf_abcdef", "relative"):
        assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["engine=transformers", "engine_args={dtype: float32}", "adapters={a: b}", "max_tokens=5", "max_n=2"]
)
def test_what_only_a_policy_has_does_nothing_for_a_reward_model(models: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="does nothing for a reward model"):
        _loaded(models / "reward", f"serve.{key}")


def test_other_addresses_need_a_key_and_this_machine_none(models: Path) -> None:
    for host in ("127.0.0.1", "127.0.0.5", "localhost", "'::1'"):
        assert _loaded(models / "policy", f"serve.host={host}").serve.api_key is None
    for key in ("FILM_KEY", "FILM_KEY=/run/secrets/film"):
        assert _loaded(models / "policy", "serve.host=0.0.0.0", f"serve.api_key={key}").serve.api_key == key


def test_keys_are_read_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("one\n\n two \n")
    assert values_at(f"K=/{tmp_path}/key", "serve.api_key") == ["one", "two"]
    monkeypatch.setenv("FILM_KEY", "three")
    assert values_at("FILM_KEY", "serve.api_key") == ["three"]
    assert values_at(None, "serve.api_key") == []
    (tmp_path / "empty").write_text("\n")
    for place in ("NO_SUCH_KEY", f"K={tmp_path}/gone", f"K={tmp_path}/empty"):
        with pytest.raises(ConfigError, match=r"serve\.api_key"):
            values_at(place, "serve.api_key")


def test_the_checks_find_what_would_fail_later(tmp_path: Path, models: Path) -> None:
    notices = check_serve(_loaded(models / "policy")).notices
    assert any("no chat template" in notice for notice in notices)
    with pytest.raises(ConfigError, match=r"serve\.adapters\.polite: no LoRA adapter"):
        check_serve(_loaded(models / "policy", f"serve.adapters={{polite: {tmp_path}}}"))
    with pytest.raises(ConfigError, match=r"serve\.label: which output is the score"):
        check_serve(_loaded(models / "reward", "serve.label=good"))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((models / "policy/config.json").read_text())
    with pytest.raises(ConfigError, match="without weights"):
        check_serve(_loaded(broken))


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"serve\.port: cannot be listened at; found: 127\.0\.0\.1:{port}"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(ResourceError):
        check_port("203.0.113.9", 8000)


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_memory_counts_what_every_replica_holds(models: Path, engine: str) -> None:
    def taken(*overrides: str) -> Any:
        run = _loaded(models / "policy", f"serve.engine={engine}", *overrides)
        node = Node("here", {"CPU": 8.0}, 8.0)
        room = Room.on(Cluster([node], "here"), need_of(run))
        (load,) = check_memory(run, room, read_shapes(run)[0])[0]
        return load.taken

    assert taken("serve.replicas=2") > taken()
