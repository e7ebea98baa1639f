"""What is checked, and made ready, before SFT, reward modelling or DPO starts."""

import tempfile

from raytrl.config.runs.supervised import SupervisedRun
from raytrl.config.sections.model import TokenizerSpec
from raytrl.errors import ConfigError
from raytrl.plan.checks.common import Facts, check_run, check_trackers
from raytrl.plan.checks.weights import check_vocabulary
from raytrl.rundir import RunDirectory


def prepare_supervised(run: SupervisedRun, run_dir: RunDirectory) -> Facts:
    """Checks data, tokenizer and model, and trains the tokenizer where one is asked for.

    Args:
        run_dir: where a trained tokenizer is read from, or put.

    Raises:
        ConfigError: something is missing, or does not fit together.
    """
    from raytrl.data import check_columns, conversation_of, load_data, texts_of  # datasets: 1.3 s

    check_trackers(run)
    embeddings = check_run(run)
    train_rows = load_data(run.data.train, "data.train")
    columns = check_columns(train_rows, run, "data.train")
    rows = {"data.train": len(train_rows)}
    if run.data.eval is not None:
        eval_rows = load_data(run.data.eval, "data.eval")
        check_columns(eval_rows, run, "data.eval")
        rows["data.eval"] = len(eval_rows)
    from raytrl.roles.models.tokenizer import check_tokenizer, load_tokenizer, train_tokenizer

    spec = run.model.tokenizer
    if isinstance(spec, TokenizerSpec):
        if run_dir.exists("tokenizer/tokenizer_config.json"):
            with run_dir.local_copy("tokenizer") as folder:
                tokenizer = load_tokenizer(folder, None, False)
        else:
            tokenizer = train_tokenizer(texts_of(train_rows, columns), spec)
            with tempfile.TemporaryDirectory() as folder:
                tokenizer.save_pretrained(f"{folder}/tokenizer")
                run_dir.store(f"{folder}/tokenizer", "tokenizer")
    else:
        try:
            tokenizer = load_tokenizer(spec or str(run.model.path), run.model.revision, run.model.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.tokenizer: cannot be loaded: {str(error).splitlines()[0]}") from None
    if run.model.pad_token is None:  # else the embeddings are made as many as the tokenizer needs
        check_vocabulary(tokenizer, embeddings.get("model.path"), "model.tokenizer")
    check_tokenizer(tokenizer, run, conversation_of(train_rows, columns))
    return Facts(rows)
