"""How should singular vectors be found, and are they worth keeping? Seconds and errors at SmolLM2-135M's shapes.

    python -m benchmarks.singular_vectors [--layers 30] [--rounds 3] [--store]

The sums are those of 20 experts of random 16×16 blocks, 5 % of each weight of v, o and the MLP. Compared are an SVD in
float32 and in float64 and the eigenvectors of the smaller Gram matrix in float64 (`merge.methods.spectral`),
interleaved, one thread. Errors are those of spectral power (p = −1) against the SVD in float64, relative to its norm.
`--store` also writes vectors and projections to the object store and reads them again (needs the local stack's
environment).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from infra.store.s3 import Store
from merge.methods.spectral import Spectrum, spectrum

SHAPES = {"v": (192, 576), "o": (576, 576), "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}
EXPERTS, BLOCK, DENSITY = 20, 16, 0.05
P, FLOOR = -1.0, 0.03


def summed(shape: tuple[int, int], seed: int) -> Tensor:
    """Σδ of experts on random blocks, fp32."""
    g = torch.Generator().manual_seed(seed)
    grid = (shape[0] // BLOCK, shape[1] // BLOCK)
    total = torch.zeros(shape)
    for _ in range(EXPERTS):
        held = (torch.rand(grid, generator=g) < DENSITY).float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        total += held * torch.randn(shape, generator=g) * 1e-3
    return total


def by_svd(dtype: torch.dtype) -> Callable[[Tensor], Spectrum]:
    """The same through a singular value decomposition."""

    def find(matrix: Tensor) -> Spectrum:
        wide = matrix.shape[0] < matrix.shape[1]
        u, s, v = torch.linalg.svd((matrix.T if wide else matrix).to(dtype), full_matrices=False)
        return Spectrum((s / s[0]).double(), v.T.float(), (u * s).float(), wide)

    return find


def exact(matrix: Tensor) -> Tensor:
    """Spectral power in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    q = s * (s / s[0]).clamp(min=FLOOR) ** (P - 1)
    return (u * (q * s.mean() / q.mean())) @ v


WAYS: dict[str, Callable[[Tensor], Spectrum]] = {
    "eigenvectors of the Gram matrix, float64": spectrum,
    "SVD, float32": by_svd(torch.float32),
    "SVD, float64": by_svd(torch.float64),
}


@click.command()
@click.option("--layers", default=30, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--store", is_flag=True, help="Also keep the vectors in the object store and fetch them.")
def main(layers: int, rounds: int, store: bool) -> None:
    """Time the ways of finding singular vectors."""
    torch.set_num_threads(1)
    sums = [summed(shape, seed) for seed, shape in enumerate(SHAPES.values())]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    applying: list[float] = []
    for _ in range(rounds):
        for name, find in WAYS.items():
            start = time.process_time()
            found = [find(matrix) for matrix in sums]
            seconds[name].append(layers * (time.process_time() - start))
        start = time.process_time()
        for each in found:
            each.reweighted(P, FLOOR)
        applying.append(layers * (time.process_time() - start))
    print(f"{layers} layers of {', '.join(f'{name} {list(shape)}' for name, shape in SHAPES.items())}\n")
    print("| way | CPU s, median (least to most) | largest relative error |\n|---|---:|---:|")
    for name, find in WAYS.items():
        wrong = [float((find(m).reweighted(P, FLOOR) - exact(m)).norm() / exact(m).norm()) for m in sums]
        low, middle, high = min(seconds[name]), statistics.median(seconds[name]), max(seconds[name])
        print(f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {max(wrong):.1e} |")
    print(f"\none further p: {statistics.median(applying):.1f} CPU s")
    if store:
        _keep(sums, layers)


def _keep(sums: list[Tensor], layers: int) -> None:
    """Write what one root's vectors take, and read it."""
    bucket, name = Store.from_env(), "benchmarks/singular-vectors"
    with tempfile.TemporaryDirectory() as folder:
        tensors = {}
        for layer in range(layers):
            for at, matrix in enumerate(sums):
                side, other = min(matrix.shape), max(matrix.shape)
                tensors[f"{layer}.{at}.vectors"] = torch.randn(side, side)
                tensors[f"{layer}.{at}.projected"] = torch.randn(other, side)
        path = Path(folder) / "vectors.safetensors"
        save_file(tensors, path)
        start = time.perf_counter()
        bucket.upload_file(name, path)
        middle = time.perf_counter()
        bucket.download_file(name, Path(folder) / "again")
        end = time.perf_counter()
        print(
            f"kept: {path.stat().st_size / 1e6:.0f} MB, {middle - start:.1f} s to store, {end - middle:.1f} s to fetch"
        )
    bucket.delete(name)


if __name__ == "__main__":
    main()
