"""A full checkpoint from one adapter by hand: checked first, then streamed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from infra.errors import AdapterError, ConfigError
from merge.by_hand.checkpoints import check_folder, checkpoint_place, recorded_checkpoint
from merge.by_hand.checks import base_place, torch_dtype
from merge.by_hand.inputs import (
    Expert,
    adapter_source,
    find_experts,
    hash_experts,
    locate_experts,
    source_sha256,
)
from merge.by_hand.outputs import Output, check_apart, check_buckets, output
from merge.by_hand.request import shard_bytes
from merge.by_hand.run import Inputs, publish_checkpoint
from merge.by_hand.sources import locate, name_of
from merge.files.checkpoint_writer import CHECKPOINT_VERSION, CheckpointInfo, write_checkpoint
from merge.tree.reduce import DeltaReader
from workers.adapters.task_mask import MaskedAdapter, MaskReader
from workers.adapters.writer import AdapterReader
from workers.base.cache import cache_dir
from workers.base.prepare import PreparedBase, prepare_base
from workers.conversion.formats import base_names


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
        target, dtype = checkpoint_place(self.place), torch_dtype(self.dtype)
        try:
            info = write_checkpoint(self._delta(inputs), inputs.checkpoint, target, dtype, self.shard_bytes)
            publish_checkpoint(target, self.place, self.record, info)
        finally:
            target.discard()
        return info

    def _delta(self, inputs: Inputs) -> DeltaReader:
        if self.mask is None:
            return inputs.reader(self.adapter)
        return MaskedAdapter(AdapterReader(adapter_source(self.adapter.place)), self.mask, self.adapter.sha256)


def check_export(
    adapter: str, base: str, out: str, mask: str | None, dtype: str | None, shard_gib: float, scratch: Path
) -> Export:
    """Everything that can be refused from headers, what is cheap first. Raises FactoryError."""
    limit, place = shard_bytes(shard_gib), output(out, "--out")
    check_buckets([place])
    places = locate_experts({name_of(adapter): adapter})
    (found,) = places.values()
    mask_place = locate(mask) if mask else None
    if found.kind == "checkpoint":
        raise ConfigError(f"{adapter}: is a full checkpoint already")
    if mask and found.kind != "adapter":
        raise ConfigError(f"--mask {mask}: is over a unified adapter's file, {adapter} is none")
    if mask_place and mask_place.kind != "adapter":
        raise ConfigError(f"--mask {mask}: is no file")
    masks = {"the mask": mask_place.uri} if mask_place else {}
    check_folder(place, {"the adapter": found.uri, **masks, **base_place(base)}, "--out")
    prepared = prepare_base(base, cache_dir())
    check_apart(place, {"the cached base": str(prepared.path.resolve())}, "--out")
    (expert,) = find_experts(places, prepared, scratch, base_names(prepared, base))
    if expert.head:
        raise AdapterError(f"{adapter}: has a classification head ({expert.head[0]}), which this base has no place for")
    (expert,) = hash_experts([expert])
    record = {
        "base_sha256": prepared.sha256,
        "adapter": expert.sha256,
        "dtype": dtype,
        "shard_bytes": limit,
        "file": CHECKPOINT_VERSION,
    }
    reader = None
    if mask_place:
        source = adapter_source(mask_place)
        reader = MaskReader(source, f"--mask {mask}")
        record["mask"] = source_sha256(source)
        MaskedAdapter(AdapterReader(adapter_source(expert.place)), reader, expert.sha256)
    return Export(prepared, expert, reader, place, dtype, limit, record, scratch)
