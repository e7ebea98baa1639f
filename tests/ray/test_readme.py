"""Every `raytrl` command of the guides, in their order and in a folder laid out as a clone is, cut short."""

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.runs import metrics, raytrl, write_rows
from tests.served import served

ROOT = Path(__file__).resolve().parents[2]
GUIDES = ("README.md", "configs/README.md", "cluster/README.md")

# Others run these: test_quickstart.py, and test_jobs.py on a Ray that takes jobs.
ELSEWHERE = ("quickstart", "submit")
SMALL_PPO = ["ppo.steps=1", "ppo.batch_size=8", "ppo.minibatches=1"]
# What makes a command short. A sweep is left with one trial or, over algorithms, with two.
CUTS = {
    "sft": ["training.max_steps=2", "data.eval=null"],
    "reward": ["training.max_steps=2", "data.eval=null"],
    "ppo": [*SMALL_PPO, "data.eval=null", "eval=null"],
    "push": ["--dry-run"],  # unit/test_push.py has a hub
    "eval": ["rows=4", "rollout.sampling.max_new_tokens=4"],
    "tune": [
        f"fixed={{{', '.join(word.replace('=', ': ') for word in SMALL_PPO)}}}",
        "search.ppo.learning_rate={grid: [3e-4]}",
        "search.ppo.kl.coef={grid: [0.05]}",
    ],
    "configs/sweep-algorithm.yaml": [
        f"fixed={{{', '.join(word.replace('=', ': ') for word in [*SMALL_PPO, 'eval.every=1'])}}}",
        "search.ppo.algorithm={grid: [grpo, rloo]}",
    ],
}


def commands(guides: Sequence[str] = GUIDES) -> list[list[str]]:
    """The words of each `raytrl …` line in the guides' shell blocks, each once."""
    pages = [(ROOT / guide).read_text() for guide in guides]
    blocks = [block for page in pages for block in re.findall(r"^```bash\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)]
    lines = [line for block in blocks for line in block.splitlines()]
    found = [line.rpartition("&&")[2].partition("#")[0].replace(".venv/bin/", "").strip() for line in lines]
    return [shlex.split(line)[1:] for line in dict.fromkeys(found) if line.startswith("raytrl ")]


def make_clone(folder: Path) -> Path:
    """The folder of a clone, with the reviews beside it: the real ones, or where they are not, rows of their columns."""
    clone = folder / "clone"
    clone.mkdir()
    (clone / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "configs/sft-reviews.yaml", clone / "my-run.yaml")
    if (ROOT.parent / "shared/data/movie-reviews").is_dir():
        (folder / "shared").symlink_to(ROOT.parent / "shared")
        return clone
    rng = random.Random(0)
    syllables = [first + vowel + last for first in "bdfgklmnprst" for vowel in "aeiou" for last in "lmnrst"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(6000)]
    for name in ("train", "test"):
        rows = [{"text": " ".join(rng.choices(words, k=12)), "label": i % 2} for i in range(1000)]
        (folder / "shared/data/movie-reviews").mkdir(parents=True, exist_ok=True)
        write_rows(folder / f"shared/data/movie-reviews/{name}.jsonl", rows)
    return clone


def as_after_quickstart(clone: Path) -> None:
    """What `raytrl quickstart` leaves, but for its models and data, which are those of the runs before."""
    folder = clone / "runs/quickstart"
    shutil.copytree(ROOT / "raytrl/quickstart", folder)
    for stage in ("sft", "reward", "ppo"):
        (folder / stage).symlink_to(f"../{stage}-reviews")
    (folder / "data").mkdir()
    for name in ("prompts", "prompts_held_out"):
        write_rows(folder / f"data/{name}.jsonl", [{"prompt": f"the film {i}"} for i in range(8)])


@pytest.mark.timeout(1800)  # twenty processes one after the other, ten of them with a Ray of their own
@pytest.mark.parametrize("guides", [GUIDES[:1], pytest.param(GUIDES, marks=pytest.mark.slow)], ids=["README", "all"])
def test_every_command_runs(guides: Sequence[str], tmp_path: Path) -> None:
    """Those of the README, and slowly of all guides."""
    clone = make_clone(tmp_path)
    for script in ("configs/arithmetic.py", "configs/games.py") if guides == GUIDES else ():
        subprocess.run([sys.executable, script], cwd=clone, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    ran = set()
    for words in commands(guides):
        if words[0] in ELSEWHERE:
            continue
        if words[0] == "eval":
            as_after_quickstart(clone)
        if words[0] == "serve":
            with served(clone, *words[1:], "serve.engine=transformers", PYTHONPATH=str(ROOT)) as server:
                assert server.ask("/health")[0] == 200
            ran.add("serve")
            continue
        cut = CUTS.get(words[-1] if words[-1].endswith(".yaml") else "", CUTS.get(words[0], []))
        output = raytrl(*words, *cut, cwd=clone, PYTHONPATH=str(ROOT))
        assert output
        ran.add(words[0])
    assert ran == {"sft", "reward", "ppo", "eval", "tune", "serve", "config", "report", "plan", "push", "--version"}
    assert "<svg" in (clone / "runs/ppo-reviews/report.html").read_text()
    assert (clone / "runs/quickstart/eval/results.json").is_file()
    assert (clone / "runs/sweep-lr-kl/best.yaml").is_file()
    if guides != GUIDES:
        return
    assert len(metrics(clone / "runs/zero2")) == 2
    assert (clone / "runs/sft-reviews-lora/model/merged").is_dir()
    assert (clone / "runs/sweep-algorithm/best.yaml").is_file()
    assert not (clone / "runs/grpo-arithmetic/value_model").exists()


def test_every_training_command_has_a_cut() -> None:
    """Those without one answer at once."""
    guide = (ROOT / "configs/README.md").read_text()
    assert all(f"python configs/{name}.py" in guide for name in ("arithmetic", "games"))
    assert {words[0] for words in commands()} - CUTS.keys() == {
        *ELSEWHERE,
        "serve",
        "config",
        "report",
        "plan",
        "--version",
    }
