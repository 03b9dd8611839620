"""A full checkpoint from one adapter by hand: checked first, then streamed. Not here: the command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import AdapterError, ConfigError
from merge.checkpoint_file import CHECKPOINT_VERSION, CheckpointInfo, write_checkpoint
from merge.mask_file import MaskedAdapter, MaskReader
from merge.reduce import DeltaReader
from pipeline.merge_inputs import Expert, adapter_source, find_experts, hash_experts, source_sha256
from pipeline.merge_outputs import Output, check_folder, output, recorded_checkpoint
from pipeline.merge_run import Inputs, checkpoint_target, finish_checkpoint, torch_dtype
from pipeline.merge_sources import locate, name_of
from workers.adapter import AdapterReader
from workers.base import PreparedBase, prepare_base
from workers.cache import cache_dir


@dataclass(frozen=True)
class Export:
    """A checked export. `record` is everything that its bytes are a function of."""

    base: PreparedBase
    adapter: Expert
    mask: MaskReader | None
    place: Output
    dtype: str | None
    shard_bytes: int
    record: dict[str, Any]
    scratch: Path

    def up_to_date(self) -> bool:
        """Whether the place holds exactly this checkpoint."""
        return recorded_checkpoint(self.place) == self.record

    def write(self) -> CheckpointInfo:
        """Make it. Raises FactoryError."""
        inputs = Inputs(self.base, self.scratch)
        target, dtype = checkpoint_target(self.place), torch_dtype(self.dtype)
        info = write_checkpoint(self._delta(inputs), inputs.checkpoint, target, dtype, self.shard_bytes)
        finish_checkpoint(self.place, self.record, info)
        return info

    def _delta(self, inputs: Inputs) -> DeltaReader:
        if self.mask is None:
            return inputs.reader(self.adapter)
        return _Masked(AdapterReader(adapter_source(self.adapter.place)), self.mask, self.adapter.sha256)


class _Masked(MaskedAdapter):
    """A unified adapter under a mask as the input of an export (a `merge.reduce.DeltaReader`)."""

    def __init__(self, unified: AdapterReader, mask: MaskReader, unified_sha256: str) -> None:
        super().__init__(unified, mask, unified_sha256)
        self.base_sha256, self.identity = self.meta.base_sha256, mask.meta.task


def check_export(
    adapter: str, base: str, out: str, mask: str | None, dtype: str | None, shard_gib: float, scratch: Path
) -> Export:
    """Everything that can be refused from headers. Raises FactoryError."""
    place = output(out, "--out")
    prepared = prepare_base(base, cache_dir())
    (expert,) = hash_experts(find_experts({name_of(adapter): adapter}, prepared, scratch))
    if expert.place.kind == "checkpoint":
        raise ConfigError(f"{adapter}: is a full checkpoint already")
    if mask and expert.place.kind != "adapter":
        raise ConfigError(f"--mask {mask}: is over a unified adapter's file, {adapter} is none")
    if expert.head:
        raise AdapterError(f"{adapter}: has a classification head ({expert.head[0]}), which this base has no place for")
    inputs = {"the adapter": expert.place.uri, "the cached base": str(prepared.path.resolve())}
    if base.startswith("path:"):
        inputs["the base"] = str(Path(base.removeprefix("path:")).expanduser().resolve())
    reader = None
    record = {
        "base_sha256": prepared.sha256,
        "adapter": expert.sha256,
        "dtype": dtype,
        "shard_bytes": int(shard_gib * 2**30),
        "file": CHECKPOINT_VERSION,
    }
    if mask:
        source = adapter_source(locate(mask))
        reader = MaskReader(source, f"--mask {mask}")
        record["mask"] = source_sha256(source)
        MaskedAdapter(AdapterReader(adapter_source(expert.place)), reader, expert.sha256)
        inputs["the mask"] = locate(mask).uri
    check_folder(place, inputs, "--out")
    return Export(prepared, expert, reader, place, dtype, int(shard_gib * 2**30), record, scratch)
