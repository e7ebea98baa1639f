"""The quickstart's run files: where they come from, where they go, whose they are."""

import shlex
from pathlib import Path
from typing import Any

import pytest

from raytrl.config.load import LoadedRun, load_run
from raytrl.errors import ConfigError
from raytrl.launch.runs.quickstart import STAGES, stage_runs, write_run_files

PACKAGED = Path(__file__).parents[2] / "raytrl/quickstart"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stages(output_dir: str, *overrides: str) -> dict[str, tuple[str, LoadedRun]]:
    write_run_files(output_dir)
    return dict(zip(STAGES, stage_runs(output_dir, overrides), strict=True))


def values_of(loaded: LoadedRun) -> dict[str, Any]:
    return {key: value for key, value, _ in loaded.values()}


def test_in_the_default_folder_they_are_the_packages_own() -> None:
    for kind, (command, loaded) in stages("runs/quickstart").items():
        file = f"runs/quickstart/{kind}.yaml"
        assert command == f"raytrl {kind} {file}"
        assert Path(file).read_text() == (PACKAGED / f"{kind}.yaml").read_text()
        assert loaded.run.output_dir == "runs/quickstart"


@pytest.mark.parametrize("folder", ["q", "else where/{q}, [1]: #2", "ünï'code\"", "1", "-q", "null"])
def test_in_another_folder_all_paths_lead_there_and_the_command_says_the_same(folder: str, tmp_path: Path) -> None:
    for output_dir in (folder, str(tmp_path / "absolute" / folder)):
        for kind, (command, loaded) in stages(output_dir, "ppo.ppo.steps=3").items():
            program, word, file, *overrides = shlex.split(command)
            assert (program, word) == ("raytrl", kind)
            assert load_run(file, overrides, kind).run == loaded.run
            here, there = values_of(loaded), values_of(load_run(str(PACKAGED / f"{kind}.yaml"), overrides, kind))
            moved = {
                key: output_dir + value.removeprefix("runs/quickstart")
                for key, value in there.items()
                if isinstance(value, str) and value.startswith("runs/quickstart")
            }
            assert len(moved) >= 2
            assert here == there | moved


def test_overrides_are_the_command_lines() -> None:
    command, loaded = stages("q", "ppo.ppo.steps=3", "sft.seed=1")["ppo"]
    assert command == "raytrl ppo q/ppo.yaml ppo.steps=3"
    assert values_of(loaded)["ppo.steps"] == 3
    assert loaded.origins["ppo.steps"] == "command line"
    assert loaded.origins["model.path"].startswith("q/ppo.yaml:")


def test_an_edited_file_stays_and_a_deleted_one_is_written_anew() -> None:
    write_run_files("q")
    text = Path("q/ppo.yaml").read_text()
    Path("q/ppo.yaml").write_text(text.replace("steps: 12", "steps: 5"))
    assert values_of(stages("q")["ppo"][1])["ppo.steps"] == 5
    Path("q/ppo.yaml").unlink()
    assert values_of(stages("q")["ppo"][1])["ppo.steps"] == 12


def test_a_file_that_leads_elsewhere_is_refused() -> None:
    write_run_files("q")
    Path("q").rename("moved")
    with pytest.raises(
        ConfigError, match=r"^moved/sft.yaml: output_dir and name lead elsewhere; found: q/sft; expected"
    ):
        stages("moved")
    with pytest.raises(ConfigError, match="found: new/other; expected: new/eval"):
        stages("new", "eval.name=other")
    assert stages("new", "eval.output_dir=./new/")


def test_what_names_no_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'steps=3': not an override of a stage"):
        stages("q", "steps=3")
    with pytest.raises(ConfigError, match="nearest known key: steps"):
        stages("q", "ppo.ppo.stepz=3")
