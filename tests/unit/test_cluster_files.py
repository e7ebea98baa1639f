"""cluster/: every file against what reads it, as far as that goes without a network."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray.serve.schema
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

from raytrl.errors import ConfigError

CLUSTER = Path("cluster")
LAUNCHER = sorted((CLUSTER / "launcher").glob("*.yaml"))
KUBERAY = sorted((CLUSTER / "kuberay").glob("*.yaml"))


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


# --- Ray's cluster launcher: its own schema and checks -----------------------------------------------------------


def check_launcher(values: dict[str, Any]) -> None:
    """What `ray up` does before it calls a cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(values)))


@pytest.mark.parametrize("path", LAUNCHER, ids=lambda path: path.stem)
def test_launcher_files_pass_rays_own_checks(path: Path) -> None:
    check_launcher(load(path))


@pytest.mark.parametrize(
    "change",
    [{"max_worker": 2}, {"head_node_type": "none"}, {"max_workers": "two"}],
    ids=lambda change: next(iter(change)),
)
def test_launcher_check_finds_mistakes(change: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r".+"):
        check_launcher(load(CLUSTER / "launcher/aws.yaml") | change)


# --- KubeRay ------------------------------------------------------------------------------------------------------

# No package carries KubeRay's CRDs. These are the fields of its API ray.io/v1 (operator 1.5 to 1.7) that may stand in
# such a file, read in rayjob_types.go and raycluster_types.go: a misspelt one is found; values are checked where given.
CLUSTER_SPEC: dict[str, Any] = {
    "rayVersion": str,
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {"idleTimeoutSeconds": int, "upscalingMode": str, "resources": dict, "version": str},
    "authOptions": {"mode": str, "secretName": str},
    "gcsFaultToleranceOptions": {
        "redisAddress": str,
        "redisPassword": {"value": str, "valueFrom": dict},
        "redisUsername": {"value": str, "valueFrom": dict},
        "externalStorageNamespace": str,
    },
    "headGroupSpec": {"rayStartParams": dict, "template": dict, "serviceType": str, "labels": dict},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "numOfHosts": int,
            "idleTimeoutSeconds": int,
            "labels": dict,
            "rayStartParams": dict,
            "template": dict,
        }
    ],
}
JOB_SPEC: dict[str, Any] = {
    "entrypoint": str,
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "submissionMode": str,
    "runtimeEnvYAML": str,
    "entrypointNumCpus": (int, float),
    "rayClusterSpec": CLUSTER_SPEC,
}
SERVICE_SPEC: dict[str, Any] = {
    "serveConfigV2": str,
    "rayClusterConfig": CLUSTER_SPEC,
    "serveService": dict,
    "upgradeStrategy": {"type": str},
    "excludeHeadPodFromServeSvc": bool,
    "serviceUnhealthySecondThreshold": int,
    "deploymentUnhealthySecondThreshold": int,
    "rayClusterDeletionDelaySeconds": int,
    "managedBy": str,
    "suspend": bool,
}
SPECS = {"RayCluster": CLUSTER_SPEC, "RayJob": JOB_SPEC, "RayService": SERVICE_SPEC}
# Of a pod's spec and of a container, as used here.
POD = {"containers", "volumes", "tolerations", "nodeSelector", "serviceAccountName", "securityContext"}
POD |= {"terminationGracePeriodSeconds"}
CONTAINER = {"name", "image", "resources", "ports", "volumeMounts", "env"}


def wrong_fields(values: Any, known: Any, where: str) -> list[str]:
    if isinstance(known, list):
        return [line for i, value in enumerate(values) for line in wrong_fields(value, known[0], f"{where}.{i}")]
    if isinstance(known, dict):
        unknown = [f"{where}.{key}: unknown" for key in values if key not in known]
        inner = [wrong_fields(v, known[k], f"{where}.{k}") for k, v in values.items() if k in known]
        return unknown + [line for lines in inner for line in lines]
    good = isinstance(values, known) and not (known is int and isinstance(values, bool))
    return [] if good else [f"{where}: found {values!r}"]


def cluster_in(spec: dict[str, Any]) -> dict[str, Any]:
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def groups_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster_in(manifest["spec"])
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_manifests(path: Path) -> None:
    manifest = load(path)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert wrong_fields(manifest["spec"], SPECS[manifest["kind"]], "spec") == []
    for group in groups_of(manifest):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        assert pod.keys() <= POD
        assert pod["containers"][0]["name"] in ("ray-head", "ray-worker")
        assert all(container.keys() <= CONTAINER for container in pod["containers"])
        mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}, "every pod sees the run directory"
        assert mounts == {"runs", "shm"} | ({"key"} if manifest["kind"] == "RayService" else set())
        assert pod["securityContext"]["fsGroup"] == user_of_the_image(), "may write to the volume"
    for group in groups_of(manifest)[1:]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_kuberay_check_finds_mistakes() -> None:
    spec = load(CLUSTER / "kuberay/rayjob.yaml")["spec"]
    spec["backofLimit"] = spec.pop("backoffLimit")
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] = "2"
    assert wrong_fields(spec, JOB_SPEC, "spec") == [
        "spec.backofLimit: unknown",
        "spec.rayClusterSpec.workerGroupSpecs.0.replicas: found '2'",
    ]


def test_a_retry_of_the_job_continues_the_run() -> None:
    """The command of a retry is that of the first start, without --fresh, and the run directory outlives the cluster."""
    spec = load(CLUSTER / "kuberay/rayjob.yaml")["spec"]
    assert spec["backoffLimit"] > 0
    words = spec["entrypoint"].split()
    assert words[0] == "raytrl"
    assert "--fresh" not in words
    assert "output_dir=/runs" in words
    assert Path(words[2]).is_file()


def unknown_keys(values: Any, model: type[BaseModel], where: str) -> list[str]:
    """Keys of a Serve config that its schema does not have; the schema itself takes any."""
    fields, found = model.model_fields, []
    for key, value in values.items():
        if key not in fields:
            found.append(f"{where}.{key}: unknown")
            continue
        below = [each for each in re.findall(r"\w+", str(fields[key].annotation)) if each in dir(ray.serve.schema)]
        inner = [getattr(ray.serve.schema, name) for name in below]
        for item in value if isinstance(value, list) else [value]:
            for schema in inner:
                if isinstance(item, dict) and isinstance(schema, type) and issubclass(schema, BaseModel):
                    found += unknown_keys(item, schema, f"{where}.{key}")
    return found


def test_what_the_service_serves_is_what_the_application_takes(tmp_path: Path) -> None:
    """Its args make an application, of a model in the place of the run; the names are those of Serve's schema."""
    from raytrl.launch.serving.application import application
    from raytrl.launch.serving.deployment import DEPLOYMENT
    from tests.ppo_files import make_policy

    service = load(CLUSTER / "kuberay/rayservice.yaml")["spec"]
    serves = yaml.safe_load(service["serveConfigV2"])
    ServeDeploySchema.model_validate(serves)
    assert unknown_keys(serves, ServeDeploySchema, "serve") == []
    (app,) = serves["applications"]
    module, _, name = app["import_path"].partition(":")
    assert (module, name) == (application.__module__, application.__name__)
    assert [each["name"] for each in app["deployments"]] == [DEPLOYMENT]
    secret, _, file = app["args"]["api_key"].partition("=")
    assert secret.isupper()
    for group in groups_of(load(CLUSTER / "kuberay/rayservice.yaml")):
        (container,) = group["template"]["spec"]["containers"]
        assert [m for m in container["volumeMounts"] if file == f"{m['mountPath']}/key"]
        assert {"containerPort": serves["http_options"]["port"], "name": "serve"} in container["ports"]
    policy = make_policy(tmp_path, head_size=32)
    application(app["args"] | {"run": policy, "engine": "transformers"})
    with pytest.raises(ConfigError, match=r"host: whoever reaches that address"):
        application({"run": policy})
    with pytest.raises(ConfigError, match=r"serve.replica: unknown key; nearest known key: replicas"):
        application(app["args"] | {"run": policy, "replica": 2})
    with pytest.raises(ConfigError, match="run: missing"):
        application({})


def test_the_check_of_a_serve_config_finds_mistakes() -> None:
    """Ray's own schema takes these."""
    wrong = {
        "http_option": {},
        "applications": [{"name": "a", "import_path": "a:b", "deployments": [{"name": "c", "max_queued": 1}]}],
    }
    ServeDeploySchema.model_validate(wrong)
    found = unknown_keys(wrong, ServeDeploySchema, "serve")
    assert found == ["serve.http_option: unknown", "serve.applications.deployments.max_queued: unknown"]


# --- Container file -----------------------------------------------------------------------------------------------


def container_steps() -> tuple[dict[str, str], list[str]]:
    """Default arguments, and the RUN lines of the last stage."""
    text = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    arguments = dict(re.findall(r"^ARG (\w+)=(.*)$", text, re.MULTILINE))
    last = text[text.rindex("\nFROM ") :]
    return arguments, re.findall(r"^RUN (.*)$", last, re.MULTILINE)


def test_ray_versions_agree() -> None:
    version = container_steps()[0]["RAY_VERSION"]
    for path in KUBERAY:
        spec = load(path)["spec"]
        assert cluster_in(spec)["rayVersion"] == version


def user_of_the_image() -> int:
    found = re.search(r"useradd .*--uid (\d+)", (CLUSTER / "Dockerfile").read_text())
    assert found is not None
    return int(found[1])


def test_container_bases_are_chosen_by_the_build_argument() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    assert re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE) == ["cpu", "cuda"]
    assert "\nFROM ${DEVICE}\n" in text
    assert container_steps()[0]["DEVICE"] == "cpu"


@pytest.mark.slow
def test_the_containers_install_steps_in_a_clean_environment(tmp_path: Path) -> None:
    """The RUN lines of the image as they stand, on a copy of what it COPYs; only the paths are this test's."""
    arguments, steps = container_steps()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, tmp_path)
    shutil.copytree("raytrl", tmp_path / "raytrl")
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")} | arguments
    environment["PATH"] = f"{tmp_path}/venv/bin:{environment['PATH']}"
    script = "\n".join(step.replace("/opt/raytrl", f"{tmp_path}/venv") for step in steps if "useradd" not in step)
    script = script.replace("/etc/profile.d", str(tmp_path)).replace("python3 -m venv", f"{sys.executable} -m venv")
    assert script.count("pip install") == 2
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Post-training on Ray" in done.stdout
    login = subprocess.run(
        ["bash", "-c", f"PATH=/usr/bin:/bin; . {tmp_path}/raytrl.sh; echo $PATH"],
        text=True,
        capture_output=True,
        check=True,
    )
    assert login.stdout.startswith("/opt/raytrl/bin:") or login.stdout.startswith(f"{tmp_path}/venv/bin:")


# --- Slurm --------------------------------------------------------------------------------------------------------


def test_slurm_script_is_clean_shell() -> None:
    script = str(CLUSTER / "slurm/raytrl.sbatch")
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(shellcheck), "--severity=warning", script], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


# --- Monitoring ---------------------------------------------------------------------------------------------------


def test_the_dashboard_shows_what_raytrl_exports_and_all_of_it() -> None:
    from raytrl.launch.session.gauges import GAUGES

    dashboard = json.loads((CLUSTER / "monitoring/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries = [query for query in queries if "ray_raytrl" in query]  # the others are Serve's: ray/test_serve_cluster.py
    shown = {name for query in queries for name in re.findall(r"ray_(\w+?)\b(?=[{ )])", query)}
    assert shown == set(GAUGES)
    for query in queries:
        name = re.search(r"ray_(raytrl_\w+)", query)
        assert name is not None
        labels = set(re.findall(r"(\w+)=~", query)) | {
            label for names in re.findall(r"by \(([^)]*)\)", query) for label in names.split(", ")
        }
        assert labels <= {"run", *GAUGES[name[1]][1]}
    prometheus = load(CLUSTER / "monitoring/prometheus.yml")
    assert prometheus["scrape_configs"][0]["file_sd_configs"]


# --- All ----------------------------------------------------------------------------------------------------------


def test_every_file_says_at_its_top_how_it_is_used() -> None:
    words = {
        "Dockerfile": "docker build",
        "rayjob.yaml": "kubectl apply",
        "raycluster.yaml": "kubectl apply",
        "rayservice.yaml": "kubectl apply",
        "raytrl.sbatch": "sbatch --nodes",
        "prometheus.yml": "prometheus --config.file",
    } | {path.name: f"ray up {path}" for path in LAUNCHER}
    files = {path.name: path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix not in (".json", ".md")}
    assert files.keys() == words.keys()
    for name, path in files.items():
        assert any(words[name] in line for line in path.read_text().splitlines()[:15]), path


def test_run_files_named_in_cluster_exist() -> None:
    for path in CLUSTER.rglob("*"):
        for name in re.findall(r"configs/[\w.-]+\.yaml", path.read_text() if path.is_file() else ""):
            assert Path(name).is_file(), (path, name)
