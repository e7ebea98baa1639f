"""The README.md of a finished model: how it was made, so that it can be made again."""

import os

import yaml
from huggingface_hub import ModelCard, ModelCardData

from raytrl.config.runs import SupervisedRun

_TASKS = {"sft": "supervised fine-tuning", "reward": "reward modelling", "dpo": "direct preference optimisation"}


def write_model_card(
    folder: str, run: SupervisedRun, command: str, versions: dict[str, str], steps: int, metrics: dict[str, float]
) -> None:
    """Writes README.md with front matter that the Hugging Face Hub reads."""
    base = run.model.path
    data = ModelCardData(
        base_model=base if base and not os.path.exists(base) else None,
        library_name="peft" if run.lora is not None else "transformers",
        pipeline_tag="text-classification" if run.kind == "reward" else "text-generation",
        tags=["raytrl", "trl", run.kind, *(["lora"] if run.lora is not None else [])],
    )
    origin = (
        f"`{base}`" if base else f"a {run.model.config['model_type'] if run.model.config else ''} with random weights"
    )
    rows = "\n".join(f"| {key} | {value:.6g} |" for key, value in metrics.items())
    text = f"""---
{data.to_yaml()}
---

# {run.name}

Made by {_TASKS[run.kind]} of {origin} on `{run.data.train.data_files or run.data.train.path}`, {steps} optimizer steps,
with raytrl on Ray Train and TRL.

| metric | value |
|---|---|
{rows}

## How it was made

```
{command}
```

```yaml
{yaml.safe_dump(run.model_dump(mode="json", exclude_none=True), sort_keys=False).strip()}
```

Versions: {", ".join(f"{name} {version}" for name, version in versions.items())}.
"""
    ModelCard(text).save(os.path.join(folder, "README.md"))
