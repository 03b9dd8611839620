"""The MLflow model of an adapter: "models from code", with the base and the adapter by reference.

MLflow runs this file when a registered adapter is loaded; nothing is pickled and neither weights nor adapter are in
the registry. The model's configuration names the adapter (bucket, prefix, name, digest), the base (SHA-256 of its
identity) and how to prompt; loading fetches the base into the machine's cache (``workers.base.cache``) once, reads the
adapter from the object store of the environment (``FACTORY_S3_ENDPOINT`` and AWS credentials) and adds it to the
weights in place.

A configuration with ``heads`` is a classifier's: per task the adapter file that holds its head, the file's digest, its
label texts and its prompt template. An expert has one head, in its own file; a merge has those of its experts.
"""

from typing import Any

from mlflow.models import set_model

from workers.serving.text_model import TextModel


class AdapterModel(TextModel):
    """A base with one adapter added."""

    def load_context(self, context: Any) -> None:
        """Load base and adapter. Raises StoreError, BaseModelError or AdapterError, which say what to do."""
        from workers.base.cache import cache_dir
        from workers.base.prepare import fetch_base
        from workers.training.in_place import apply_delta

        super().load_context(context)
        config = self._config
        reader = self.open_adapter(config["adapter"], config["adapter_sha256"])
        self.load_folder(fetch_base(self._store, config["base_sha256"], cache_dir()))
        apply_delta(self._model, reader)


set_model(AdapterModel())
