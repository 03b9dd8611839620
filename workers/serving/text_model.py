"""What registered models of every kind share: taking texts, fetching what they refer to, and answering.

A registered model's code (`workers.serving.adapter_model`, `workers.serving.checkpoint_model`) loads a model and a
tokenizer from references; then it answers: greedily, with one of the options that come with an input or, with
``heads``, with a label. All rows of a task that one call gives are answered as the evaluation answered them: the same
prompt, limits, batches and code, so with the same type and device the same answers. Heavy imports happen inside
functions only, so that registering a model stays quick.

``mlflow.pyfunc.load_model(uri, model_config={"device": "cuda:0", "batch_size": 8, "dtype": "bfloat16"})`` replaces
what was recorded; several devices are separated by commas. Another type or batch size rounds otherwise.
"""

import hashlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from mlflow.pyfunc import PythonModel


def as_rows(model_input: Any) -> Any:
    """A dictionary as a list of rows: it is one row, or a table whose values are columns. Anything else as it is."""
    if not isinstance(model_input, dict):
        return model_input
    if isinstance(model_input.get("input"), str):
        return [model_input]
    columns = [list(column) for column in model_input.values()]
    return [dict(zip(model_input, values, strict=True)) for values in zip(*columns, strict=True)]


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


def as_tasks(model_input: Any, known: Sequence[str], rows: int, optional: bool = False) -> list[Any]:
    """The task of each input: the table's column ``task``; it may be missing where only one task is known.

    With ``optional``, None stands for inputs without a task.
    """
    tasks = _column(model_input, "task", rows)
    if len(known) == 1 and tasks == [None] * rows:
        tasks = list(known) * rows
    elif tasks == [None] * rows and not optional:
        raise ValueError(f"give a table with the columns 'input' and 'task'; tasks: {', '.join(known)}")
    for task in tasks:
        if task not in known and not (optional and task is None):
            raise ValueError(f"this model does not know the task {task!r}; tasks: {', '.join(known) or 'none'}")
    return tasks


def as_options(model_input: Any, rows: int) -> list[tuple[str, ...] | None]:
    """The options of each input: lists of texts in the table's column ``options``; None where there are none."""
    found = []
    for options in _column(model_input, "options", rows):
        if options is not None and (isinstance(options, str) or not all(isinstance(each, str) for each in options)):
            raise ValueError(f"options must be a list of strings, got {options!r:.80}")
        found.append(tuple(options) if options is not None and len(options) else None)
    return found


def _column(model_input: Any, name: str, rows: int) -> list[Any]:
    """A column of a table, or a field of dictionaries; None where it is missing."""
    values: list[Any] = [None] * rows
    if name in list(getattr(model_input, "columns", [])):
        values = model_input[name].tolist()
    elif isinstance(model_input, list):
        values = [row.get(name) if isinstance(row, dict) else None for row in model_input]
    return [None if isinstance(value, float) else value for value in values]  # pandas writes a missing value as NaN


def open_adapter(store: Any, name: str, sha256: str, base_sha256: str) -> Any:
    """A reader of the adapter in the store; AdapterError unless the file has this digest ("": any) and is for the
    base."""
    from infra.errors import AdapterError
    from infra.store.source import StoreSource
    from workers.adapters.writer import AdapterReader, check_base

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
    """``predict`` generates greedily, chooses or classifies: one string per input. Subclasses load the model."""

    def load_context(self, context: Any) -> None:
        """Load what the configuration refers to. Raises StoreError, BaseModelError or AdapterError, which say what to
        do."""
        from infra.store.s3 import Store

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
        """Load model and tokenizer from a prepared base's folder (`workers.base.prepare`)."""
        import torch

        from workers.base.load import load_classifier, load_classifier_tokenizer, load_model, load_tokenizer
        from workers.training.devices import spread

        dtype, devices = getattr(torch, self._config["dtype"]), self._config["device"].split(",")
        if self._heads:
            labels = next(iter(self._config["heads"].values()))["labels"]
            self._model = spread(load_classifier(folder, len(labels), dtype), devices)
            self._tokenizer = load_classifier_tokenizer(folder)
        else:
            self._model = spread(load_model(folder, dtype), devices)
            self._tokenizer = load_tokenizer(folder)

    def predict(self, context: Any, model_input, params: dict[str, Any] | None = None):  # type: ignore[no-untyped-def]
        """Answers to a list of strings or a table with the column ``input``, in order.

        The table's column ``task`` names the task of each input, whose prompt is used (a classifier of several tasks
        needs it); the column ``options`` lists what an input is to be answered with.
        """
        # The input is left without a type hint: MLflow would derive a stricter schema from it.
        model_input = as_rows(model_input)
        texts = as_texts(model_input)
        options = as_options(model_input, len(texts))
        if self._heads:
            return self._classify(texts, as_tasks(model_input, list(self._heads), len(texts)), options)
        known = list(self._config["prompts"])
        return self._answer(texts, as_tasks(model_input, known, len(texts), optional=True), options)

    def _answer(self, texts: list[str], tasks: list[str | None], options: list[tuple[str, ...] | None]) -> list[str]:
        """Rows that share a prompt and a way of answering go together, in order."""
        from workers.scoring.likelihood import EvaluateSpec, answer_rows
        from workers.text.rows import Row

        plain = {
            "template": self._config["prompt_template"],
            "max_new_tokens": self._config["max_new_tokens"],
            "chooses": False,
            "length_normalised": False,
        }
        groups: dict[tuple[str | None, bool, bool], list[int]] = {}
        for i, task in enumerate(tasks):
            prompt, given = self._config["prompts"].get(task, plain), options[i] is not None
            shows = given or "{options}" not in prompt["template"]
            groups.setdefault((task, shows, given and prompt["chooses"]), []).append(i)
        answers = [""] * len(texts)
        for (task, shows, chooses), at in groups.items():
            prompt = self._config["prompts"].get(task, plain)
            spec = EvaluateSpec(
                metric="choice_accuracy" if chooses else "exact_match",
                template=prompt["template"] if shows else prompt["template"].replace("{options}", ""),
                wrapper=self._config["prompt_wrapper"],
                max_new_tokens=int(prompt["max_new_tokens"]),
                max_input_tokens=self._max_input_tokens(),
                length_normalised=prompt["length_normalised"],
            )
            rows = [Row(str(i), texts[i], (), options[i]) for i in at]
            found = answer_rows(self._model, self._tokenizer, rows, spec, int(self._config["batch_size"]))
            for i, answer in zip(at, found, strict=True):
                answers[i] = answer
        return answers

    def _max_input_tokens(self) -> int:
        return int(self._config["max_input_tokens"] or sys.maxsize)

    def _classify(self, texts: list[str], tasks: list[str], options: list[tuple[str, ...] | None]) -> list[str]:
        from workers.scoring.classification import predict_labels, set_head
        from workers.text.prompt import PromptSpec
        from workers.text.rows import Row

        answers = [""] * len(texts)
        for task in dict.fromkeys(tasks):
            head = self._config["heads"][task]
            labels, template = head["labels"], head["prompt_template"]
            at = [i for i, wanted in enumerate(tasks) if wanted == task]
            if any(options[i] is None for i in at):
                template = template.replace("{options}", "")  # free inputs come without options
            spec = PromptSpec(template, self._config["prompt_wrapper"], self._max_input_tokens())
            rows = [Row(str(i), texts[i], (), options[i]) for i in at]
            set_head(self._model, self._heads[task])
            size = int(self._config["batch_size"])
            for i, label in zip(
                at, predict_labels(self._model, self._tokenizer, spec, rows, labels, size), strict=True
            ):
                answers[i] = labels[label]
        return answers
