"""Every `raytrl` command of the README, in its order and in a folder laid out as a clone is, cut short."""

import re
import shlex
from pathlib import Path

from tests.runs import metrics, raytrl

ROOT = Path(__file__).resolve().parents[2]


# Others run these: test_quickstart.py, and test_jobs.py on a Ray that takes jobs.
ELSEWHERE = ("quickstart", "submit")
# What makes a command short.
CUTS = {"config": [], "report": [], "plan": [], "ppo": ["ppo.steps=1", "ppo.batch_size=8", "ppo.minibatches=1"]}


def commands() -> list[list[str]]:
    """The words of each `raytrl …` line in the README's shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    found = [line.rpartition("&&")[2].partition("#")[0].replace(".venv/bin/", "") for line in lines]
    return [shlex.split(line)[1:] for line in found if line.strip().startswith("raytrl ")]


def test_every_command_runs(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "shared").symlink_to(ROOT.parent / "shared")
    (clone / "my-run.yaml").write_text((ROOT / "configs/sft-reviews.yaml").read_text())
    ran = set()
    for words in commands():
        if words[0] in ELSEWHERE:
            continue
        cut = CUTS.get(words[0], ["training.max_steps=2", "data.eval=null"])
        output = raytrl(*words, *cut, cwd=clone, PYTHONPATH=str(ROOT))
        assert output
        ran.add(words[0])
    assert ran == {"sft", "reward", "ppo", "config", "report", "plan"}
    assert "<svg" in (clone / "runs/sft-reviews/report.html").read_text()
    assert len(metrics(clone / "runs/zero2")) == 2
    assert (clone / "runs/sft-reviews-lora/model/merged").is_dir()
