"""Reward models: a sequence classifier with its own tokenizer, given text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raytrl.config.sections.reward import SourceSection
from raytrl.errors import ConfigError
from raytrl.records.samples import PromptText
from raytrl.roles.models.positions import positions_of
from raytrl.roles.reward.call import Asked, Failure, Pair
from raytrl.within import within

_CUT_HERE = "\ue0c7cut\ue0c7"  # of the private use area: no text has it


class TooLong(Failure):
    """A text that is longer than the classifier can take."""


class ModelSource:
    """Any sequence classifier; the score is one raw output (a logit), float32.

    What it reads is text, never the policy's token ids. A standard prompt: prompt + response, and the classifier's own
    end token when the response ended, as TRL's RewardTrainer puts it there in training. A chat prompt: its own chat
    template over all messages; for a response that was cut, without what the template puts after it.

    It is scored where transformers scored it in training: at its last token that is not the classifier's padding. So a
    classifier whose padding token is its end token is never scored at the end token, and cannot tell an ended response
    from a cut one. Measured on such a model from RewardTrainer: held-out accuracy 1.00 so, 0.89 at the end token.

    A text longer than the classifier can take is a failure, not cut: the cut end would be scored as if it were the
    response's. Scores do not depend on which responses share a batch (float32: to 1e-6 of their size).

    Raises ConfigError when the classifier cannot be loaded, was never trained as one, or `label` names no output.
    """

    def __init__(self, section: SourceSection, device: str | None = None, keys: tuple[str, str] | None = None) -> None:
        """
        Args:
            device: default: a GPU where there is one.
            keys: of model and label in the run file, for messages; default: those of a reward source.
        """
        assert section.model is not None
        self.section = section
        model_key, label_key = keys or tuple(f"reward.sources.{section.name}.{key}" for key in ("model", "label"))
        self._where = f"{model_key}: {section.model}"
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        path = _merged(section.model, self._where)
        self._model, self._tokenizer = self._load(path)
        _head_in_float32(self._model)
        self._text_config = self._model.config.get_text_config()
        self._text_config.use_cache = False  # keys and values of all layers are more than the activations, for no token
        self._output = output_index(self._model.config, section.label, label_key)
        self._padding: int | None = self._text_config.pad_token_id
        self._vocabulary: int = self._model.get_input_embeddings().num_embeddings
        self._max_tokens = _max_tokens(self._text_config, self._tokenizer)
        eos = self._tokenizer.eos_token
        ends_itself = eos is not None and self._tokenizer("a")["input_ids"][-1:] == [self._tokenizer.eos_token_id]
        self._end = "" if eos is None or ends_itself else str(eos)

    def call(self, pairs: Sequence[Pair]) -> Sequence[object]:
        """One value a response; see `RewardSource`."""
        return within(self.section.timeout_s, lambda: self.scores([self.token_ids(Asked.of(pair)) for pair in pairs]))

    def close(self) -> None:
        """Nothing outlives the object."""

    def text(self, row: Asked) -> str:
        """What the classifier reads of one prompt and response."""
        if isinstance(row.prompt, str):
            return f"{row.prompt}{row.completion}{self._end if row.whole else ''}"
        messages = [*row.prompt, *row.completion]
        if row.whole:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False))
        # transformers' `continue_final_message` refuses what a template changes, which for some is all reasoning.
        messages[-1] = {**messages[-1], "content": f"{messages[-1].get('content') or ''}{_CUT_HERE}"}
        text, found, _ = str(self._tokenizer.apply_chat_template(messages, tokenize=False)).rpartition(_CUT_HERE)
        if not found:
            raise ValueError("the template leaves out the end of a response that was cut")
        return text

    def token_ids(self, row: Asked) -> list[int] | Failure:
        """The classifier's own token ids of one prompt and response, or why it cannot read them."""
        chat = not isinstance(row.prompt, str)
        if chat and not self._tokenizer.chat_template:
            return Failure("its tokenizer has no chat template, and the prompt is a list of messages", retry=False)
        try:
            text = self.text(row)
        except Exception as error:  # a template is a program; it may raise anything, and does for one response alone
            return Failure(f"its chat template cannot render the response: {error}", retry=False)
        return self._ids(text, chat)

    def whole_ids(self, whole: PromptText, options: Mapping[str, Any]) -> list[int] | Failure:
        """As `token_ids`, of a text or conversation that is complete: as TRL's RewardTrainer reads one side of a pair.

        Args:
            options: for the chat template: tools, and what else it takes.
        """
        if isinstance(whole, str):
            return self._ids(whole if self._end and whole.endswith(self._end) else whole + self._end, False)
        if not self._tokenizer.chat_template:
            return Failure("its tokenizer has no chat template, and the texts are lists of messages", retry=False)
        try:
            return self._ids(str(self._tokenizer.apply_chat_template(list(whole), tokenize=False, **options)), True)
        except Exception as error:
            return Failure(f"its chat template cannot render the text: {error}", retry=False)

    def _ids(self, text: str, chat: bool) -> list[int] | Failure:
        # A chat template writes the special tokens itself.
        ids = list(self._tokenizer(text, add_special_tokens=not chat)["input_ids"])
        if not ids:
            return Failure("the text has no tokens", retry=False)
        if len(ids) > self._max_tokens:
            return TooLong(f"the text has {len(ids)} tokens; the model takes {self._max_tokens}", retry=False)
        if max(ids) >= self._vocabulary:
            return Failure(f"token id {max(ids)} of its tokenizer; the model has {self._vocabulary}", retry=False)
        return ids

    @torch.inference_mode()
    def scores(self, rows: Sequence[list[int] | Failure]) -> list[object]:
        """The score of each row of token ids, all in one forward pass; a Failure stays what it is."""
        sound = [row for row in rows if not isinstance(row, Failure)]
        if not sound:
            return list(rows)
        filler = self._filler(sound)
        width = max(len(row) for row in sound)
        ids = torch.tensor([row + [filler] * (width - len(row)) for row in sound], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in sound], device=self._device)
        # transformers scores a row at its rightmost token that is not the configured padding id, and without such an id
        # refuses more than one row at a time.
        self._text_config.pad_token_id = filler
        logits = self._model(input_ids=ids, attention_mask=mask).logits[:, self._output].float()
        scores = iter(logits.tolist())
        return [row if isinstance(row, Failure) else next(scores) for row in rows]

    def _filler(self, rows: Sequence[list[int]]) -> int:
        """The model's own padding id, as in training; without one, an id that is no row's last token."""
        if self._padding is not None and self._padding < self._vocabulary:
            return self._padding
        end = self._text_config.eos_token_id  # encoder-decoders score at the end token: no filler may look like it
        taken = {row[-1] for row in rows} | set(end if isinstance(end, list) else [end])
        return next(candidate for candidate in range(self._vocabulary) if candidate not in taken)

    def _load(self, path: str) -> tuple[Any, Any]:
        section = self.section
        half = section.dtype == "bfloat16" or (section.dtype == "auto" and self._device.type == "cuda")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=section.trust_remote_code)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=torch.bfloat16 if half else torch.float32,
                trust_remote_code=section.trust_remote_code,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{self._where}: cannot be loaded as a sequence classifier; {error}") from error
        absent = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
        if absent:
            raise ConfigError(
                f"{self._where}: not a trained sequence classifier; found: no weights for {', '.join(absent[:4])}, "
                "which would be random; expected: a model trained as one; train it with `raytrl reward`"
            )
        return model.eval().to(self._device), tokenizer


def _head_in_float32(model: Any) -> None:
    """So that close scores stay apart: bfloat16 has two or three digits. The body stays as it is."""
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Module):
            head.float()
            head.register_forward_pre_hook(lambda _, inputs: tuple(each.float() for each in inputs))


def _merged(model: str, where: str) -> str:
    """The folder to load: of a LoRA adapter, the merged model that raytrl keeps beside it."""
    folder = Path(model)
    if not (folder / "adapter_config.json").is_file():
        return model
    for merged in (folder / "merged", folder.parent / "merged"):
        if (merged / "config.json").is_file():
            return str(merged)
    raise ConfigError(
        f"{where}: is a LoRA adapter; found: no merged model in {folder / 'merged'}; expected: a whole classifier; "
        "merge the adapter into its base and name that folder"
    )


def output_index(config: Any, label: str | int | None, where: str) -> int:
    """Which output is the score; ConfigError when `label` does not name exactly one."""
    names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    count = int(config.num_labels)
    if label is None and count == 1:
        return 0
    found = [index for index in range(count) if label == index or label == names.get(index)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{index} ({names.get(index)})" for index in range(count))
    raise ConfigError(f"{where}: which output is the score; found: {label!r}; expected: one of {known}; set label")


def _max_tokens(text_config: Any, tokenizer: Any) -> int:
    """The longest text that both the model's positions and the tokenizer allow."""
    positions = positions_of(text_config)
    limits = [None if positions is None else positions.most, tokenizer.model_max_length]
    return min(int(limit) for limit in limits if limit is not None)
