"""The README.md of a finished model: how it was made, so that it can be made again."""

import os

from huggingface_hub import ModelCard, ModelCardData

from raytrl.config.runs.base import TrainingRun
from raytrl.config.yaml12 import dump


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
