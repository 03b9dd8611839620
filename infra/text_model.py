"""What registered models of every kind share: taking texts, fetching what they refer to, and answering.

A registered model's code (`infra.adapter_model`, `infra.checkpoint_model`) loads a model and a tokenizer from
references; then it generates greedily or, with ``heads``, classifies. Heavy imports happen inside functions only, so
that registering a model stays quick.
"""

import hashlib
import sys
import warnings
from typing import Any

from mlflow.pyfunc import PythonModel


def as_texts(model_input: Any) -> list[str]:
    """The inputs as a list of strings: a list, one string, or a table with the column ``input`` (or only one)."""
    if isinstance(model_input, str):
        return [model_input]
    columns = getattr(model_input, "columns", None)
    if columns is not None:
        names = list(columns)
        if "input" not in names and len(names) != 1:
            raise ValueError(f"the table has the columns {names}; accepted: a column named 'input', or one column")
        model_input = model_input["input" if "input" in names else names[0]].tolist()
    texts = [row["input"] if isinstance(row, dict) and "input" in row else row for row in model_input]
    for row in texts:
        if not isinstance(row, str):
            raise ValueError(f"each input must be a string, got {type(row).__name__}: {row!r:.80}")
    return texts


def as_tasks(model_input: Any, known: list[str], rows: int) -> list[str]:
    """The task of each input: the table's column ``task``; it may be missing where only one task is known."""
    if "task" in list(getattr(model_input, "columns", [])):
        tasks = model_input["task"].tolist()
    elif isinstance(model_input, list) and any(isinstance(row, dict) and "task" in row for row in model_input):
        tasks = [row.get("task") if isinstance(row, dict) else None for row in model_input]
    elif len(known) == 1:
        tasks = known * rows
    else:
        raise ValueError(f"give a table with the columns 'input' and 'task'; tasks: {', '.join(known)}")
    for task in tasks:
        if task not in known:
            raise ValueError(f"this model has no head for the task {task!r}; tasks: {', '.join(known)}")
    return tasks


def open_adapter(store: Any, name: str, sha256: str, base_sha256: str) -> Any:
    """A reader of the adapter in the store; AdapterError unless the file has this digest ("": any) and is for the
    base."""
    from infra.errors import AdapterError
    from infra.store_source import StoreSource
    from workers.adapter import AdapterReader, check_base

    source = StoreSource(store, name)
    if sha256:
        digest = hashlib.sha256()
        for start in range(0, source.size, 1 << 24):
            digest.update(source.read(start, min(1 << 24, source.size - start)))
        if digest.hexdigest() != sha256:
            raise AdapterError(f"{store.uri(name)} is corrupted: SHA-256 {digest.hexdigest()}, registered as {sha256}")
    reader = AdapterReader(source)
    check_base(reader, base_sha256)
    return reader


# MLflow advises type hints (they would narrow what predict accepts) and an input example (it would run the model).
warnings.filterwarnings("ignore", message=r"(?s).*(Add type hints to the|An input example was not provided)")


class TextModel(PythonModel):
    """``predict`` generates greedily, or classifies: one string per input. Subclasses load the model."""

    def load_context(self, context: Any) -> None:
        """Load what the configuration refers to. Raises StoreError, BaseModelError or AdapterError, which say what to
        do."""
        from infra.store import Store

        self._config = dict(context.model_config)
        self._store = Store(self._config["bucket"], Store.from_env().endpoint, self._config["prefix"])
        self._readers: dict[tuple[str, str], Any] = {}
        self._heads: dict[str, dict[str, Any]] = {}
        for task, head in (self._config.get("heads") or {}).items():
            reader = self.open_adapter(head["adapter"], head["sha256"])
            self._heads[task] = {name: reader.load_head(name) for name in reader.head_names}

    def open_adapter(self, name: str, sha256: str) -> Any:
        """A reader of an adapter of the configuration's base, whose bytes are verified the first time."""
        if (name, sha256) not in self._readers:
            reader = open_adapter(self._store, name, sha256, self._config["base_sha256"])
            self._readers[name, sha256] = reader
        return self._readers[name, sha256]

    def load_folder(self, folder: Any) -> None:
        """Load model and tokenizer from a prepared base's folder (`workers.base`)."""
        import torch

        from workers.model import load_classifier, load_classifier_tokenizer, load_model, load_tokenizer

        dtype = getattr(torch, self._config["dtype"])
        if self._heads:
            labels = next(iter(self._config["heads"].values()))["labels"]
            self._model = load_classifier(folder, len(labels), dtype)
            self._tokenizer = load_classifier_tokenizer(folder)
        else:
            self._model = load_model(folder, dtype)
            self._tokenizer = load_tokenizer(folder)

    def predict(self, context: Any, model_input, params: dict[str, Any] | None = None):  # type: ignore[no-untyped-def]
        """Generated strings, or label texts, for a list of strings or a table with the column ``input``, in order.

        A classifier of several tasks needs the table's column ``task`` too.
        """
        # The input is left without a type hint: MLflow would derive a stricter schema from it.
        texts = as_texts(model_input)
        if self._heads:
            return self._classify(texts, as_tasks(model_input, list(self._heads), len(texts)))
        return self._generate(texts) if texts else []

    def _prompt(self, template: str) -> Any:
        from workers.prompt import PromptSpec

        return PromptSpec(
            template=template.replace("{options}", ""),  # free inputs come without options
            wrapper=self._config["prompt_wrapper"],
            max_input_tokens=int(self._config["max_input_tokens"] or sys.maxsize),
        )

    def _generate(self, texts: list[str]) -> list[str]:
        from workers.decoding import generate
        from workers.prompt import render, truncate_left

        spec = self._prompt(self._config["prompt_template"])
        prompts = [render(spec, truncate_left(self._tokenizer, text, spec.max_input_tokens)) for text in texts]
        return generate(self._model, self._tokenizer, prompts, int(self._config["max_new_tokens"]))

    def _classify(self, texts: list[str], tasks: list[str]) -> list[str]:
        from workers.classification import predict_labels, set_head
        from workers.rows import Row

        answers = [""] * len(texts)
        for task in dict.fromkeys(tasks):
            labels = self._config["heads"][task]["labels"]
            spec = self._prompt(self._config["heads"][task]["prompt_template"])
            at = [i for i, wanted in enumerate(tasks) if wanted == task]
            rows = [Row(str(i), texts[i], ()) for i in at]
            set_head(self._model, self._heads[task])
            for i, label in zip(at, predict_labels(self._model, self._tokenizer, spec, rows, labels), strict=True):
                answers[i] = labels[label]
        return answers
