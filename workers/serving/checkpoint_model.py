"""The MLflow model of a full checkpoint: "models from code", with the checkpoint's files by reference.

MLflow runs this file when a registered checkpoint is loaded. The model's configuration names each file (object name,
SHA-256, size); loading downloads and verifies them once per machine and keeps them in its cache
(``workers.base.cache``) as a prepared base, one mapped file whatever the number of shards. Answers are those of an
adapter model of the same weights (`workers.serving.text_model`). The object store is that of the environment.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from mlflow.models import set_model

from workers.serving.text_model import TextModel


class CheckpointModel(TextModel):
    """A full checkpoint from the object store."""

    def load_context(self, context: Any) -> None:
        """Load the checkpoint. Raises StoreError, BaseModelError or AdapterError, which say what to do."""
        from workers.base.cache import cache_dir

        super().load_context(context)
        self.load_folder(fetch_checkpoint(self._store, self._config["files"], self._config["digest"], cache_dir()))


def fetch_checkpoint(store: Any, files: dict[str, dict[str, Any]], digest: str, cache: Path) -> Path:
    """Folder of the prepared checkpoint on this machine: from the cache, else downloaded once and verified.

    ``files``: name to the fields of its ``FileRef``. StoreError for a file that is missing or has other bytes,
    BaseModelError for files that are no checkpoint.
    """
    from filelock import FileLock

    from infra.errors import BaseModelError
    from infra.store.s3 import FileRef
    from workers.base.prepare import IDENTITY, prepare_base, read_base

    folder = cache / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / f"{digest}.json"
    with FileLock(str(note) + ".lock"):
        if note.is_file():
            known = Path(json.loads(note.read_text())["path"])
            if (known / IDENTITY).is_file():
                return read_base(known).path
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
            for name, ref in files.items():
                if Path(name).name != name:
                    raise BaseModelError(f"checkpoint {digest}: {name!r} is no name of a file in its folder")
                store.download_file(FileRef(**ref), Path(temporary) / name)
            path = prepare_base(f"path:{temporary}", cache).path
        note.write_text(json.dumps({"path": str(path)}))
    return path


set_model(CheckpointModel())
