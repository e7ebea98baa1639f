"""The pages for people: links lead somewhere, example run files load, keys and commands that they name exist.

Their `raytrl …` commands in shell blocks are run by tests/ray/test_readme.py.
"""

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytrl.cli import app
from raytrl.config.describe import fields_at
from raytrl.config.foreign.native import native_fields
from raytrl.config.kinds import RUNS, forms_of
from raytrl.config.load import load_run
from raytrl.config.runs.base import Run
from raytrl.config.trials import check_edges, load_base

ROOT = Path(__file__).parents[2]
FOLDERS = (".github", "cluster", "configs", "raytrl", "tests")
PAGES = sorted({*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))})
# What makes a part of a run file a whole one.
_MODEL: dict[str, Any] = {"model": {"path": "a/model"}, "data": {"train": "rows.jsonl"}}
_REWARD: dict[str, Any] = {"reward": {"sources": [{"name": "a", "model": "a/judge"}]}}
WHOLE: dict[str, dict[str, Any]] = {
    "sft": _MODEL,
    "reward": _MODEL,
    "dpo": _MODEL,
    "ppo": _MODEL | _REWARD,
    "eval": _MODEL | {"data": {"eval": "rows.jsonl"}} | _REWARD,
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- Links --------------------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What a forge makes of the headings: lower case, words joined by hyphens, without punctuation."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """Relative links of a page to files or headings that are not there."""
    text = page.read_text()
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page) == []


def test_the_link_check_finds_what_is_gone(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A heading, here\n")
    page = tmp_path / "page.md"
    good = "[a](there.md) [b](there.md#a-heading-here) [c](#own) [d](https://example.com/gone)\n# Own\n"
    page.write_text(f"{good}[x](gone.md) [y](there.md#no-heading) [z](#nowhere)\n```\n[picture](gone.md)\n```\n")
    assert dead_links(page) == ["gone.md", "there.md#no-heading", "#nowhere"]


@pytest.mark.parametrize(
    ("page", "files"),
    [
        ("configs/README.md", [*ROOT.glob("configs/*.yaml"), *ROOT.glob("configs/*.py")]),
        ("cluster/README.md", [path for path in ROOT.glob("cluster/**/*") if path.is_file() and path.suffix != ".md"]),
    ],
)
def test_a_guide_names_every_file_of_its_folder(page: str, files: list[Path]) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text())
    linked = {(ROOT / page).parent / link for link in links}
    assert [name_of(file) for file in files if file not in linked] == []


# --- Example run files --------------------------------------------------------------------------------------------


def examples(text: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def check_example(text: str) -> str:
    """Loads an example in an empty folder that has configs/ and quickstart's run files; returns its kind.

    A part of a run file says in its first line of which kind: `# part of a ppo file`.
    """
    values = yaml.safe_load(text)
    part = re.match(r"# part of an? (\w+) file\n", text)
    if part is not None:
        values = {"kind": part[1], "name": "whole", **WHOLE[part[1]], **values}
        Path("run.yaml").write_text(yaml.safe_dump(values))
    else:
        Path("run.yaml").write_text(text)
    loaded = load_run("run.yaml", [])
    if loaded.run.kind == "tune":
        load_base(loaded)
        check_edges(loaded)
    return loaded.run.kind


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(ROOT / "raytrl/quickstart", tmp_path / "runs/quickstart")
    finished = tmp_path / "runs/my-ppo"
    (finished / "model").mkdir(parents=True)
    (finished / "manifest.json").write_text(json.dumps({"kind": "ppo", "state": "done"}))
    (finished / "model/config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))


EXAMPLES = [(name_of(page), text) for page in PAGES for text in examples(page.read_text())]


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize(("page", "text"), EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_every_example_is_a_run_file(page: str, text: str) -> None:
    assert check_example(text) in RUNS


def test_every_kind_of_run_has_a_whole_example_in_the_guide() -> None:
    text = (ROOT / "configs/README.md").read_text()
    assert {match[1] for example in examples(text) if (match := re.match(r"kind: (\w+)", example))} == set(RUNS)
    assert "sft" in str(EXAMPLES[0]) and EXAMPLES[0][0] == "README.md"


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize(
    "text",
    [
        "kind: sft\nname: a\nmodel: {path: a}\ndata: {trian: a.jsonl}\n",
        "# part of a ppo file\nrollout: {actor: 2}\n",
        "rollout: {actors: 2}\n",  # neither whole nor marked
        "kind: tune\nname: a\nbase: runs/quickstart/ppo.yaml\nsearch: {ppo.stepz: {grid: [1]}}\nmetric: a\nmode: max\n",
    ],
)
def test_the_example_check_finds_mistakes(text: str) -> None:
    with pytest.raises(Exception, match=r"trian|actor|kind|stepz"):
        check_example(text)


# --- Keys and commands in the text --------------------------------------------------------------------------------


def inline(text: str) -> list[str]:
    """What stands in code style within the prose."""
    return re.findall(r"`([^`\n]+)`", prose(text))


def has_key(run: type[Run], key: str) -> bool:
    *parents, last = key.split(".")
    native = run.foreign().get(parents[0])
    if native is not None and len(parents) == 1:
        return last in native_fields(native)
    return last in fields_at(run, parents)


def unknown_keys(text: str) -> list[str]:
    """Dotted keys in the prose, `rollout.actors` or `learner.workers: 2`, that no kind of run has."""
    runs = [run for kind in RUNS for run in forms_of(kind)]
    sections = {name for run in runs for name in run.model_fields}
    found = [match[0] for code in inline(text) if (match := re.match(r"\w+(\.\w+)+(?=$|[:=])", code))]
    keys = [key for key in found if key.split(".")[0] in sections and not key.endswith((".py", ".yaml", ".jsonl"))]
    return [key for key in keys if not any(has_key(run, key) for run in runs)]


def unknown_commands(text: str) -> list[str]:
    """`raytrl WORD …` in the prose where there is no such command."""
    known = {"KIND", "--version", "--install-completion", "config"} | {
        command.name or str(getattr(command.callback, "__name__", "")) for command in app.registered_commands
    }
    return [code for code in inline(text) if code.startswith("raytrl ") and code.split()[1] not in known]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_keys_and_commands_in_the_text_exist(page: Path) -> None:
    assert unknown_keys(page.read_text()) == []
    assert unknown_commands(page.read_text()) == []


def test_the_text_check_finds_mistakes() -> None:
    text = "`rollout.actors`, `rollout.actor`, `training.max_length`, `training.max_len: 2`, `ppo.kl.coef=1`, `report.html`"
    assert unknown_keys(text) == ["rollout.actor", "training.max_len"]
    assert unknown_commands("`raytrl tune FILE`, `raytrl tuna FILE`, `raytrl --version`") == ["raytrl tuna FILE"]


# --- .github ------------------------------------------------------------------------------------------------------


def test_the_hosted_check_is_the_projects_own() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["ci"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    assert [f">={step['with']['python-version']}" for step in steps if "with" in step] == [project["requires-python"]]
    contacts = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/config.yml").read_text())["contact_links"]
    assert all(contact["url"].startswith(project["urls"]["Source"] + "/") for contact in contacts)
    for form in ("bug", "feature"):
        fields = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{form}.yml").read_text())["body"]
        assert len({field["id"] for field in fields}) == len(fields)
        assert all(field["attributes"]["label"] for field in fields)
