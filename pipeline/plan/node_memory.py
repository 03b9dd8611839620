"""What a merge node takes in memory, from the shapes of the adapted weights alone: before anything is trained.

A node holds the statistics of one tensor at a time, so that its largest tensor counts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from merge.methods.catalogue import METHODS
from merge.methods.specs import LiftSpec, Reduction
from merge.methods.spectral import CHUNK_BYTES
from merge.methods.statistic_table import STATISTICS
from merge.methods.statistics import statistic_dtype

_INDEX_BYTES = 8
_COPIES = 4
"""Statistics of a tensor at a time: joined, of the child being added and of the next one, and while they are encoded or
lowered. With the constants below within -5 % and +45 % of the peaks measured at 1 to 8 statistics."""
_PER_POSITION = 16
"""Further bytes a position of the union: the merged values and what they are made of."""
_PER_ELEMENT = 17
"""Further bytes an element of the tensor, held or not: which positions are, and what was decoded."""
_PER_MATRIX_ELEMENT = 52
"""Bytes an element of a Gram matrix [in, in]: the sum, those being read, and in double precision the matrix, its
factors and their work space."""

_PER_DENSE_ELEMENT = 24
"""Further bytes an element where a method makes a matrix of a weight: Σδ, Σδ times its singular vectors, the merged δ
and its positions."""
_PER_SIDE = 56
"""Bytes an element of the smaller Gram matrix there: in double precision the matrix, its vectors, their work space."""

# Reductions that keep matrices of a weight and no positions; with these constants within -8 % and +45 % of the peaks
# measured with 8 full experts of 576 x 576 to 1024 x 4096.
_PER_BARE_ELEMENT = 144
"""Bytes an element: the dense δ being read and lifted, the joined matrices, the merged δ and its positions."""
_PER_BARE_REFERENCE = 75
"""Further bytes where they read an earlier round's merge."""
_PER_BARE_MATRIX = 46
"""Bytes an element of what they add up beyond the weight's own size."""
_PER_BARE_SIDE = 150
"""Bytes an element of the smaller Gram matrix, where experts' directions are found (two experts at a time) and made
orthogonal."""
_PER_DIRECTION_BYTE = 7
"""Bytes for each one of the directions that are more than a weight has."""


@dataclass(frozen=True)
class NodeNeed:
    """The largest need of a plan's nodes: bytes beside the process, the tensor, and the methods that are lowered."""

    bytes: int
    tensor: str
    shape: tuple[int, int]
    methods: tuple[str, ...]


def largest_node(
    reductions: Sequence[Reduction], shapes: Mapping[str, tuple[int, int]], experts: int, union: float
) -> NodeNeed:
    """The node that needs most. `shapes`: [out, in] by name; `union`: share of a tensor that all supports cover."""
    needs = []
    for reduction in reductions:
        methods = tuple(dict.fromkeys(candidate.method for candidate in reduction.candidates))
        for name, shape in shapes.items():
            dense = any(METHODS[method].matrix for method in methods)
            bare = any(STATISTICS[each].bare for each in reduction.spec.statistics)
            size = _bare(reduction.spec, name, shape, experts) if bare else 0
            needs.append(NodeNeed(size or _bytes(reduction.spec, shape, experts, union, dense), name, shape, methods))
    return max(needs, key=lambda need: need.bytes)


def node_file(spec: LiftSpec, shapes: Mapping[str, tuple[int, int]], experts: int, union: float) -> float:
    """About the bytes of one node's statistics: 11 a position, or a reduction's matrices."""
    if any(STATISTICS[each].bare for each in spec.statistics):
        return sum(spec.matrix_bytes(name, shape, experts) for name, shape in shapes.items())
    return 11 * union * sum(map(prod, shapes.values()))


def _bare(spec: LiftSpec, name: str, shape: tuple[int, int], experts: int) -> int:
    held, side = spec.matrix_bytes(name, shape, experts), min(shape)
    need = prod(shape) * (_PER_BARE_ELEMENT + (_PER_BARE_REFERENCE if spec.reference else 0))
    if any(STATISTICS[each].operator == "below" for each in spec.statistics):
        more = max(0, held - 4 * side * sum(shape))
        return need + _PER_BARE_SIDE * side**2 + _PER_DIRECTION_BYTE * more
    return need + _PER_BARE_MATRIX * (held // 4 - prod(shape))


def _bytes(spec: LiftSpec, shape: tuple[int, int], experts: int, union: float, dense: bool) -> int:
    elementwise = [name for name in spec.statistics if STATISTICS[name].kind != "matrix"]
    width = sum(statistic_dtype(name, experts, spec.weighted).itemsize for name in elementwise)
    reads = _INDEX_BYTES + 4 if spec.reference else 0
    full = any(STATISTICS[name].full for name in spec.statistics)
    position = _COPIES * (_INDEX_BYTES + width) + reads + _PER_POSITION
    element = width + _PER_ELEMENT
    matrices = any(STATISTICS[name].kind == "matrix" for name in spec.statistics)
    matrix = _PER_MATRIX_ELEMENT * shape[1] ** 2 if matrices else 0
    if dense:
        element += _PER_DENSE_ELEMENT
        matrix += _PER_SIDE * min(shape) ** 2 + 2 * min(CHUNK_BYTES, 8 * prod(shape))
    return round(prod(shape) * (element + (1.0 if full else union) * position)) + matrix
