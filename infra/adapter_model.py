"""The MLflow model of an adapter: "models from code", with the base and the adapter by reference.

MLflow runs this file when a registered adapter is loaded; nothing is pickled and neither weights nor adapter are in
the registry. The model's configuration names the adapter (bucket, prefix, name, digest), the base (SHA-256 of its
identity) and how to prompt; loading fetches the base into the machine's cache (``workers.cache``) once, reads the
adapter from the object store of the environment (``FACTORY_S3_ENDPOINT`` and AWS credentials) and adds it to the
weights in place.

Heavy imports happen in ``load_context`` only, so that registering a model stays quick.
"""

import hashlib
import warnings
from typing import Any

from mlflow.models import set_model
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


# MLflow advises type hints (they would narrow what predict accepts) and an input example (it would run the model).
warnings.filterwarnings("ignore", message=r"(?s).*(Add type hints to the|An input example was not provided)")


class AdapterModel(PythonModel):
    """A base with one adapter added; ``predict`` generates greedily, one string per input."""

    def load_context(self, context: Any) -> None:
        """Load base and adapter. Raises StoreError, BaseModelError or AdapterError, which say what to do."""
        import torch

        from infra.errors import AdapterError
        from infra.store import Store, StoreSource
        from workers.adapter import AdapterReader, check_base
        from workers.base import fetch_base
        from workers.cache import cache_dir
        from workers.inplace import apply_delta
        from workers.model import load_model, load_tokenizer

        config = context.model_config
        store = Store(config["bucket"], Store.from_env().endpoint, config["prefix"])
        source = StoreSource(store, config["adapter"])
        if config["adapter_sha256"]:
            digest = hashlib.sha256()
            for start in range(0, source.size, 1 << 24):
                digest.update(source.read(start, min(1 << 24, source.size - start)))
            if digest.hexdigest() != config["adapter_sha256"]:
                raise AdapterError(
                    f"{config['adapter_uri']} is corrupted: SHA-256 {digest.hexdigest()}, "
                    f"registered as {config['adapter_sha256']}"
                )
        reader = AdapterReader(source)
        check_base(reader, config["base_sha256"])
        folder = fetch_base(store, config["base_sha256"], cache_dir())
        self._model = load_model(folder, getattr(torch, config["dtype"]))
        self._tokenizer = load_tokenizer(folder)
        apply_delta(self._model, reader)
        self._config = dict(config)

    def predict(self, context: Any, model_input, params: dict[str, Any] | None = None):  # type: ignore[no-untyped-def]
        """Generated strings for a list of strings or a table with the column ``input``, in order."""
        # The input is left without a type hint: MLflow would derive a stricter schema from it.
        from workers.decoding import generate
        from workers.prompt import PromptSpec, render, truncate_left

        config = self._config
        template = config["prompt_template"].replace("{options}", "")  # free inputs come without options
        spec = PromptSpec(template=template, wrapper=config["prompt_wrapper"])
        texts = as_texts(model_input)
        if config["max_input_tokens"]:
            texts = [truncate_left(self._tokenizer, text, int(config["max_input_tokens"])) for text in texts]
        prompts = [render(spec, text) for text in texts]
        return generate(self._model, self._tokenizer, prompts, int(config["max_new_tokens"])) if prompts else []


set_model(AdapterModel())
