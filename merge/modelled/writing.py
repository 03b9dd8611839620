"""A merge that is at hand tensor by tensor, as an adapter file; how far it is from the base is told on the way."""

from collections.abc import Iterable
from pathlib import Path

from infra.store.s3 import Store
from infra.store.source import StoreSource
from merge.files.merged import AdapterWriter
from merge.files.sink import Outline
from merge.tree.reduce import DeltaTally
from workers.adapters.support import SparseTensor
from workers.tensors.reader import TensorReader, damaged
from workers.tensors.source import ReadAhead


def write_merged(
    store: Store, base_weights: str, outline: Outline, tensors: Iterable[tuple[str, SparseTensor]], out: Path
) -> tuple[DeltaTally, int]:
    """Write what `outline` announces, in its order, to `out`; nothing is left there of a file that is not whole.

    `base_weights`: object name of the base's weights, for the loss of rounding. Returns what the tensors come to, and
    the file's bytes.
    """
    base = TensorReader(ReadAhead(StoreSource(store, base_weights)), damaged("the base's safetensors file"))
    sink, tally = AdapterWriter(out), DeltaTally()
    sink.open(outline)
    try:
        for name, tensor in tensors:
            sink.add(name, tensor)
            tally.add(tensor.values, base.read(name).view(-1).index_select(0, tensor.indices))
        sink.close()
    except BaseException:
        sink.abort()
        raise
    return tally, sink.bytes_written
