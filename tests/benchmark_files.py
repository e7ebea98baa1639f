"""Small tasks of lm-eval on this machine's data: two choices, a text to write, a text to be surprised by."""

import random
from pathlib import Path

import yaml

from tests.runs import WORDS, sentence, write_rows

_COMMON = {"dataset_path": "json", "test_split": "test", "target_delimiter": "", "metadata": {"version": 1.0}}
TASKS = {
    "choose": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "fewshot_split": "test",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "surprise": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{prompt}}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
}


def make_tasks(folder: Path, documents: int = 24) -> Path:
    """Writes the tasks and their data; returns the folder of the tasks."""
    rng = random.Random(0)
    rows = [
        {
            "prompt": sentence(rng)[:-2],
            "choices": [f" {' '.join(rng.choices(WORDS, k=3))}" for _ in range(2)],
            "gold": row % 2,
        }
        for row in range(documents)
    ]
    data = write_rows(folder / "questions.jsonl", rows)
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        whole = {"task": name, **_COMMON, "dataset_kwargs": {"data_files": {"test": data}}, **task}
        (folder / f"tasks/{name}.yaml").write_text(yaml.safe_dump(whole))
    return folder / "tasks"
