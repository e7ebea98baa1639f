"""The README.md of a finished model: how it was made, so that it can be made again."""

import os
import re
import shlex
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from raytrl.config.runs.base import TrainingRun
from raytrl.config.yaml12 import dump, parse

_BLOCK = re.compile(r"^```(?P<kind>\w*)\n(?P<text>.*?)\n```$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`([^`\n]+)`")
# A path from the root or a home directory, or an address, but for the hub's own.
_PLACE = re.compile(r"(?:~/|/[^/]+/).+|(?!hf://|https://huggingface\.co/)[A-Za-z][\w+.-]*://.+", re.DOTALL)
_WITHIN = re.compile(
    r"(?<![\w./~:-])(?:~/|/[^/\s]+/|(?!hf://|https://huggingface\.co/)[A-Za-z][\w+.-]*://)[^\s`'\",;)\]}]*"
)


def write_model_card(
    folder: str, run: TrainingRun, command: str, versions: dict[str, str], steps: int, metrics: dict[str, float]
) -> None:
    """Writes README.md with front matter that the Hugging Face Hub reads."""
    base = run.model.path
    data = ModelCardData(
        base_model=base if base and not os.path.exists(base) else None,
        library_name="peft" if run.lora is not None else "transformers",
        pipeline_tag="text-classification" if run.models()[0].head == "score" else "text-generation",
        tags=["raytrl", *(["trl"] if run.trl_trainer else []), run.kind, *(["lora"] if run.lora is not None else [])],
    )
    origin = (
        f"`{base}`" if base else f"a {run.model.config['model_type'] if run.model.config else ''} with random weights"
    )
    rows = "\n".join(f"| {key} | {value:.6g} |" for key, value in metrics.items())
    text = f"""---
{data.to_yaml()}
---

# {run.name}

Made by {run.task} of {origin} on `{run.data.train.data_files or run.data.train.path}`, {steps} {run.step_name},
with raytrl on Ray Train{" and TRL" if run.trl_trainer else ""}.

| metric | value |
|---|---|
{rows}

## How it was made

```
{command}
```

```yaml
{dump(run.model_dump(mode="json", exclude_none=True)).strip()}
```

Versions: {", ".join(f"{name} {version}" for name, version in versions.items())}.
"""
    ModelCard(text).save(os.path.join(folder, "README.md"))


def for_others(card: str, library: str) -> tuple[str, int]:
    """The card as it is published, and how many places it named that are nobody else's.

    Paths from the root and addresses tell of a machine, its users and buckets, and lead nobody else anywhere: of each the
    last part is kept.

    Args:
        library: which the published folder is loaded with; of a LoRA run the card says peft, and what is merged is not.
    """
    shortened = 0

    def short(match: re.Match[str]) -> str:
        nonlocal shortened
        shortened += 1
        return f".../{match[0].partition('?')[0].rstrip('/').rpartition('/')[2]}"

    def value(found: Any) -> Any:
        if isinstance(found, dict):
            return {value(key): value(item) for key, item in found.items()}
        if isinstance(found, list):
            return [value(item) for item in found]
        if not isinstance(found, str):
            return found
        whole = _PLACE.fullmatch(found)
        return short(whole) if whole else _WITHIN.sub(short, found)

    def word(found: str) -> Any:
        key, equals, given = found.partition("=")  # an address may hold one, too
        return f"{key}={value(given)}" if equals and not _PLACE.fullmatch(found) else value(found)

    def block(match: re.Match[str]) -> str:
        if match["kind"] == "yaml":
            return f"```yaml\n{dump(value(parse(match['text'], 'the card')[0])).strip()}\n```"
        return f"```\n{shlex.join(map(word, shlex.split(match['text'])))}\n```"

    text = _BLOCK.sub(block, card)
    text = _CODE.sub(lambda match: f"`{value(match[1])}`", text)
    text = re.sub(r"^library_name: \w+$", f"library_name: {library}", text, count=1, flags=re.MULTILINE)
    if shortened:
        text = f"{text.rstrip()}\n\nOf paths and addresses of the machine that made it, the last part is left.\n"
    return text, shortened
