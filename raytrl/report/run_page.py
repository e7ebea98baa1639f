"""report.html of a run: how it went, in pictures; what it said; how it was made."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from raytrl.errors import ConfigError
from raytrl.records.metrics import (
    ALL_PHASES,
    CLIPPED,
    ENTROPY,
    EQUAL,
    ESS,
    EVAL_ACCURACY,
    EVAL_LOSS,
    EVAL_SCORE,
    FAILED,
    KL,
    LENGTH,
    LOSS,
    METRICS,
    SAMPLING_KL,
    SCORE,
    STEP_S,
    TOLD,
    time_of,
)
from raytrl.report.conversation import as_html, text_of
from raytrl.report.page import as_svg, page, panels, shown, table
from raytrl.report.results_page import results_parts
from raytrl.rundir import RunDirectory

Rows = Sequence[Mapping[str, Any]]

# What is drawn: a picture's title and its lines, each a metric and its name there. Pictures without data are left out.
PICTURES: tuple[tuple[str, dict[str, str]], ...] = (
    ("loss", {LOSS: "training", EVAL_LOSS: "held out"}),
    ("accuracy", {"accuracy": "training", EVAL_ACCURACY: "held out", "eval_rewards/accuracies": "held out"}),
    ("token accuracy", {"mean_token_accuracy": "training", "eval_mean_token_accuracy": "held out"}),
    ("margin", {"margin": "training", "eval_margin": "held out", "rewards/margins": "training"}),
    ("score", {SCORE: "sampled", EVAL_SCORE: "held out"}),
    (f"KL to the reference, {METRICS[KL].unit}", {KL: "KL"}),
    ("prompts whose responses all score alike", {EQUAL: "share"}),
    (
        "effective size of older samples",
        {ESS: "effective size", "importance/capped_fraction": "capped"},
    ),
    (f"KL from the sampler, {METRICS[SAMPLING_KL].unit}", {SAMPLING_KL: "KL"}),
    (f"entropy, {METRICS[ENTROPY].unit}", {ENTROPY: "entropy"}),
    ("tokens a response", {LENGTH: "sampled", TOLD: "said by tools"}),
    ("calls", {"tools/call_frequency": "a conversation", "tools/failure_frequency": "share failed"}),
    ("turns a conversation", {"conversations/turns": "turns"}),
    ("conversations lost", {FAILED: "failed", "conversations/timed_out": "timed out"}),
    ("ended by themselves", {"response/ended_fraction": "share"}),
    ("share clipped", {CLIPPED: "policy", "val/clipfrac_avg": "value"}),
    ("policy loss", {"loss/policy_avg": "policy"}),
    ("value loss", {"loss/value_avg": "value"}),
    ("explained variance of the values", {"val/explained_variance": "explained"}),
    ("KL coefficient", {"objective/kl_coef": "coefficient"}),
    ("learning rate", {"learning_rate": "learning rate", "lr": "learning rate"}),
    ("gradient norm", {"grad_norm": "gradient norm"}),
    ("seconds a step", {STEP_S: "seconds"}),
    ("peak memory, GiB", {"memory/peak_gib": "GiB"}),
)


def write_run_page(run_dir: RunDirectory) -> str:
    """Writes report.html into the run directory; returns where it is.

    Raises:
        ConfigError: there is no run in the directory.
    """
    manifest = run_dir.manifest()
    if not manifest:
        raise ConfigError(f"{run_dir}: no run; found: no manifest.json; expected: the directory of a run")
    results = json.loads(run_dir.read("results.json") or "{}")  # of a run that failed, what it had measured
    page_text = run_page(str(run_dir), manifest, run_dir.metrics(), run_dir.rows("samples.jsonl"), results)
    run_dir.write("report.html", page_text)
    return f"{run_dir}/report.html"


def run_page(
    title: str, manifest: Mapping[str, Any], metrics: Rows, samples: Rows, results: Mapping[str, Any] | None = None
) -> str:
    """The page.

    Args:
        title: which run it is.
        manifest: of the run, in whatever state.
        metrics: rows of metrics.jsonl, none for an evaluation.
        samples: rows of samples.jsonl, none for a supervised run.
        results: what results.json holds, of runs that measure.
    """
    parts = [_summary(manifest, metrics)]
    if (curves := _curves(metrics)) is not None:
        parts.append(f"<figure>{curves}</figure>")
    if _has_phases(metrics):
        parts.append(f"<h2>Where the time goes</h2><figure>{_phases(metrics)}</figure>")
    parts += results_parts(results or {}, samples)
    if samples and "task" in samples[0]:
        parts.append(f"<h2>Answers</h2>{_answers(samples)}")
    elif samples and "scores" in samples[0]:
        parts.append(f"<h2>Responses</h2>{_samples(samples)}")
    if manifest.get("metrics"):
        parts.append(_folded("Metrics at the end", table((), manifest["metrics"].items())))
    settings = manifest.get("origins", {}).items()
    parts.append(_folded("What was set, and where", table(("key", "origin"), settings)))
    return page(f"{manifest['kind']}: {title}", parts)


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def _summary(manifest: Mapping[str, Any], metrics: Rows) -> str:
    lines: list[tuple[str, Any]] = [("state", manifest["state"])]
    if "error" in manifest and manifest["state"] == "failed":
        lines.append(("error", manifest["error"]))
    lines += [(key, manifest[key]) for key in ("command", "started", "finished", "starts", "model") if key in manifest]
    if metrics:
        lines.append(("steps", metrics[-1]["step"]))
    lines.append(("versions", ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())))
    return table((), lines)


def _curves(metrics: Rows) -> str | None:
    found = []
    for title, lines in PICTURES:
        drawn = {key: [(row["step"], row[key]) for row in metrics if key in row] for key in lines}
        if any(drawn.values()) and not (STEP_S in lines and _has_phases(metrics)):  # drawn phase by phase
            found.append((title, {lines[key]: points for key, points in drawn.items() if points}))
    if not found:
        return None
    figure, axes = panels(len(found))
    for each, (title, drawn) in zip(axes, found, strict=True):
        for name, points in drawn.items():
            few = len(points) < 12
            each.plot(*zip(*points, strict=True), lw=1.4, marker="o" if few else None, ms=4, label=name)
        each.set_title(title, fontsize=10)
        each.tick_params(labelsize=8)
        if len(drawn) > 1:
            each.legend(fontsize=8, frameon=False)
    return as_svg(figure)


def _has_phases(metrics: Rows) -> bool:
    return any(time_of("generate") in row for row in metrics)


def _phases(metrics: Rows) -> str:
    """Seconds of each step, one phase on top of the other."""
    figure, (axes,) = panels(1)
    figure.set_size_inches(11, 3)
    rows = [row for row in metrics if time_of("generate") in row]
    phases = [phase for phase in ALL_PHASES if any(time_of(phase) in row for row in rows)]
    parts = [[row.get(time_of(phase), 0.0) for row in rows] for phase in phases]
    axes.stackplot([row["step"] for row in rows], parts, labels=phases, alpha=0.85)
    axes.set(xlabel="step", ylabel="seconds")
    axes.legend(fontsize=8, frameon=False, ncols=len(phases), loc="upper center", bbox_to_anchor=(0.5, 1.15))
    return as_svg(figure)


def _samples(samples: Rows, count: int = 6) -> str:
    """Of training, the first and the last responses; of an evaluation, each model's to the same prompts."""
    if "model" in samples[0]:
        models = list(dict.fromkeys(row["model"] for row in samples))
        chosen = [row for row in samples if row["row"] < count]
        chosen.sort(key=lambda row: (row["row"], models.index(row["model"])))
        return _responses("model", chosen)
    first, last = samples[0]["step"], samples[-1]["step"]
    at_first = [row for row in samples if row["step"] == first][:count]
    return _responses("step", at_first + [row for row in samples if row["step"] == last != first][:count])


def _answers(samples: Rows, count: int = 4) -> str:
    """Each model's to a few documents of each task: those come first that the models answer unlike."""
    models = list(dict.fromkeys(row["model"] for row in samples))
    by_place: dict[tuple[str, str], dict[int, list[Mapping[str, Any]]]] = {}
    for row in samples:
        by_place.setdefault((row["task"], row["filter"]), {}).setdefault(row["doc_id"], []).append(row)
    chosen: list[Mapping[str, Any]] = []
    for documents in by_place.values():
        alike = {
            doc_id: all(row["metrics"] == rows[0]["metrics"] for row in rows) for doc_id, rows in documents.items()
        }
        for doc_id in sorted(documents, key=lambda each: (alike[each], each))[:count]:
            chosen += sorted(documents[doc_id], key=lambda row: models.index(row["model"]))
    lines = "".join(
        f"<tr><td>{html.escape(row['task'])}</td><td>{html.escape(row['model'])}</td>"
        f"<td><span class=quiet>{html.escape(row['prompt'])}</span>{html.escape(row['response'])}</td>"
        f"<td>{html.escape(_told(row['metrics']))}</td></tr>"
        for row in chosen
    )
    return f"<table><tr><th>task</th><th>model</th><th>question and answer</th><th>metrics</th></tr>{lines}</table>"


def _told(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in metrics.items())


def _responses(key: str, rows: Rows) -> str:
    lines = []
    for row in rows:
        scores = ", ".join(
            f"{name} {value:.2f}" if value is not None else f"{name} -" for name, value in row["scores"].items()
        )
        lines.append(
            f"<tr><td>{html.escape(str(row[key]))}</td><td>{_said(row)}</td><td>{html.escape(scores)}</td></tr>"
        )
    return f"<table><tr><th>{key}</th><th>prompt and response</th><th>scores</th></tr>{''.join(lines)}</table>"


def _said(row: Mapping[str, Any]) -> str:
    """Prompt and response; of a conversation all that was said."""
    if "messages" in row:
        why = f"<div class=quiet>{html.escape(row.get('failure') or row['end'])}</div>"
        return as_html([*row["prompt"], *row["messages"]]) + why
    prompt = row["prompt"] if isinstance(row["prompt"], str) else text_of(row["prompt"][-1])
    return f"<span class=quiet>{html.escape(prompt)}</span>{html.escape(row['response'])}"
