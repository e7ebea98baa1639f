"""A run file holds no credentials: they would be stored with the run."""

from pathlib import Path

import pytest

from raytrl.config.load import load_run
from raytrl.errors import ConfigError
from tests.runs import run_file


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=s3://me:v4lue@bucket/runs",
        "output_dir=s3://bucket/runs?access_key=me&secret_key=v4lue&region=x",
        "data.train=https://hf_v4lue@host/a.jsonl",
        "data.train={path: json, data_files: [https://host/a.jsonl?sig=v4lue]}",
        "data.train=https://host/a.jsonl?X-Amz-Signature=v4lue",
        "training.hub_token=hf_v4lue",
        "training.push_to_hub_token=hf_v4lue",
        "training={hub_token: hf_v4lue}",
        "output_dirs=s3://me:v4lue@bucket",
        "no key=s3://me:v4lue@bucket",
    ],
)
def test_credentials_are_refused_without_showing_them(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r": holds (a secret|credentials).*found: \(not shown\); expected: ") as error:
        load_run(run_file(tmp_path, "a"), [override])
    assert "v4lue" not in str(error.value)


def test_the_file_is_looked_at_too(tmp_path: Path) -> None:
    file = run_file(tmp_path, "a", output_dir="s3://me:v4lue@bucket/runs")
    with pytest.raises(ConfigError, match=r"output_dir: holds credentials in an address") as error:
        load_run(file, [])
    assert "v4lue" not in str(error.value)


@pytest.mark.parametrize(
    "override",
    [
        "output_dir=s3://bucket/runs?region=x&endpoint_override=127.0.0.1:1&scheme=http",
        "output_dir=gs://anonymous@bucket/runs",
        "output_dir=abfss://container@account.dfs.core.windows.net/runs",
        "output_dir=/data/a@b:c/runs",
        "training.hub_token=null",
        "training.eos_token=</s>",
    ],
)
def test_what_is_no_secret_stays(override: str, tmp_path: Path) -> None:
    load_run(run_file(tmp_path, "a"), [override])
