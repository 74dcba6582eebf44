"""The leading singular vectors of every weight: what PiSSA and LoRA-XS keep of a base.

    W_l = U_l diag(s_l) V_l^T        U_l (d_out, r), s_l (r,) descending, V_l (d_in, r)

The exact SVD is computed in float64 with fixed signs: the largest entry of each column of U_l is positive. Smaller
ranks are leading columns, so a cache entry serves them too. The randomized SVD (Halko et al. 2009, torch's
`svd_lowrank` as in peft) is for one rank and number of iterations, with the layer number as its seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from craft_cli.errors import ConfigError, ModelError
from craft_cli.files import checksum, entries_of, read_tensors, write_tensors
from craft_cli.methods.base import Method, Progress
from craft_cli.methods.cache import SAME, FrozenCache, Kept, Serves, recall
from craft_cli.models.checkpoint import MOST_LAYERS
from craft_cli.models.stacks import Shape, Weights, read_identity
from craft_cli.tucker import canonical_basis, canonical_signs, orthonormal

KIND = "singular vectors"
_PARTS = ("out", "values", "in")


@dataclass(frozen=True, eq=False, repr=False)
class SingularVectors(Kept):
    """The singular vectors of some projections of a model.

    Attributes:
        parts: U (L, d_out, r), s (L, r) and V (L, d_in, r) of every projection, float32.
        niter: iterations of the randomized SVD; None for the exact SVD.
    """

    parts: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    niter: int | None = None

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape (L, d_out, d_in) of every projection's stack."""
        return {target: (len(u), u.shape[1], v.shape[1]) for target, (u, _, v) in self.parts.items()}

    def select(self, targets: Sequence[str], rank: int | None = None) -> SingularVectors:
        """Select projections, and truncate to a rank (default: the stored rank).

        Raises:
            ConfigError: a projection or the rank was not prepared.
        """
        self.check_targets(targets)
        chosen = {}
        for target in targets:
            u, s, v = self.parts[target]
            r = s.shape[1] if rank is None else min(rank, *self.shapes[target][1:])
            if r > s.shape[1] or (self.niter and r != s.shape[1]):
                raise ConfigError(f"--rank {rank}: only {s.shape[1]} singular vectors of {target} were prepared")
            chosen[target] = (u[:, :, :r].contiguous(), s[:, :r].contiguous(), v[:, :, :r].contiguous())
        return replace(self, parts=chosen, fingerprints={target: self.fingerprints[target] for target in targets})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in a file: `TARGET.singular.out`, `.values`, `.in`."""
        return {
            f"{target}.singular.{part}": tensor
            for target, tensors in self.parts.items()
            for part, tensor in zip(_PARTS, tensors, strict=True)
        }

    def sha256(self) -> str:
        """The sha256 of all tensors, by which an adapter refers to them."""
        return checksum(self.tensors())

    def identity(self) -> dict[str, Any]:
        """The entries for the header of a file."""
        return super().identity() | {"niter": self.niter}

    def resembles(self, target: str, layers: Sequence[Tensor], tolerance: float) -> bool:
        """Whether U_l^T W_l V_l is diag(s_l) within a relative tolerance; see `Frozen`."""
        u, s, v = (tensor.to(layers[0].device) for tensor in self.parts[target])
        core = torch.stack([u_l.T @ layer.float() @ v_l for u_l, layer, v_l in zip(u, layers, v, strict=True)])
        return bool((core - torch.diag_embed(s)).norm() <= tolerance * s.norm())

    def belong_to(self, weights: Weights, tolerance: float = SAME) -> bool:
        """See `Kept`."""
        for target, stack in weights.stacks.items():
            if self.shapes.get(target) != weights.shapes[target]:
                return False
            for u, s, v, layer in zip(*self.parts[target], stack, strict=True):
                core = u.T @ layer[:].to("cpu", torch.float32) @ v
                if not (orthonormal(u) and orthonormal(v)):
                    return False
                if not (core - s.diag()).norm() <= tolerance * s.norm():
                    return False
        return True

    def save(self, path: Path) -> None:
        """Write one safetensors file.

        Raises:
            FileError: the file cannot be written.
        """
        write_tensors(path, KIND, self.tensors(), self.identity() | self.contents())

    def contents(self) -> dict[str, Any]:
        """See `Kept`."""
        return {
            "targets": list(self.targets),
            "shapes": {target: list(shape) for target, shape in self.shapes.items()},
            "ranks": {target: s.shape[1] for target, (_, s, _) in self.parts.items()},
        }

    @classmethod
    def load(cls, path: Path) -> SingularVectors:
        """Read such a file.

        Raises:
            FileError: the file does not exist, is damaged, or is of another kind.
        """
        return cls.read(*read_tensors(path, KIND), path)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> SingularVectors:
        """Parse the tensors and the header of a file, which may come from an untrusted source.

        Raises:
            FileError: an entry is missing or invalid.
        """
        with entries_of(path):
            identity, parts = read_identity(header), {}
            for target in header["targets"]:
                u, s, v = (tensors[f"{target}.singular.{part}"] for part in _PARTS)
                if [t.ndim for t in (u, s, v)] != [3, 2, 3] or not (u.shape[::2] == v.shape[::2] == s.shape):
                    raise ValueError(f"the singular vectors of {target} have inconsistent shapes")
                if not 0 < len(s) <= MOST_LAYERS or not 0 < s.shape[1] <= min(u.shape[1], v.shape[1]):
                    raise ValueError(f"{target} has {len(s)} layers and {s.shape[1]} singular values")
                if any(t.dtype != torch.float32 or not torch.isfinite(t).all() for t in (u, s, v)) or (s < 0).any():
                    raise ValueError(f"{target} has values that are not finite float32 numbers")
                parts[target] = (u, s, v)
            niter = header["niter"]
            if not (niter is None or (type(niter) is int and niter > 0)):
                raise ValueError("its header's niter is not a positive integer")
            return cls(**identity, parts=parts, niter=niter)


@torch.no_grad()
def decomposed(weight: Tensor, rank: int, niter: int | None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, r), s (r,), V (d_in, r) of a weight (d_out, d_in), float32; r is at most the smaller dimension.

    Args:
        weight: the weight, of any floating-point dtype.
        rank: number of singular vectors.
        niter: iterations of the randomized SVD. Default: exact SVD.
        seed: random seed of the randomized SVD.
    """
    rank = min(rank, *weight.shape)
    if niter is None:
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        whole = canonical_basis(s, u, len(s))
        v = vh.T @ (u.T @ whole)
        numerical = int((s > 1e-12 * s[0]).sum())  # numerical rank; beyond it, left and right vectors are unrelated
        u, v = _completed(whole[:, :numerical], len(s)), _completed(v[:, :numerical], len(s))
        return _as_kept(u[:, :rank], s[:rank], v[:, :rank])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight.float(), rank, niter=niter)
    flipped = canonical_signs(u)
    return _as_kept(flipped, s, v * (flipped * u).sum(0).sign())


def _completed(vectors: Tensor, count: int) -> Tensor:
    """Complete orthonormal vectors (n, k) to (n, count); the new ones depend only on the remaining space."""
    draw = torch.Generator().manual_seed(0)
    fixed = torch.randn(len(vectors), count - vectors.shape[1], generator=draw, dtype=vectors.dtype)
    more = torch.linalg.qr(fixed - vectors @ (vectors.T @ fixed))[0]
    return torch.cat([vectors, more], 1)


def _as_kept(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return u.float().contiguous(), s.float().contiguous(), v.float().contiguous()


def singular_vectors(
    weights: Weights, rank: int, niter: int | None, cache_dir: str | None, progress: Progress
) -> tuple[SingularVectors, Sequence[str]]:
    """The singular vectors of a model's weights, from the cache or newly computed.

    Args:
        weights: weights of the projections.
        rank: rank to keep; reduced to the smaller dimension.
        niter: iterations of the randomized SVD. Default: exact SVD.
        cache_dir: cache folder. Default: `~/.cache/craft`.
        progress: called with (description, layers done, number of layers).

    Returns:
        The singular vectors, and notes for the user.

    Raises:
        ModelError: a weight is not finite.
        FileError: the cache is not writable.
    """
    prints, targets = weights.fingerprints, weights.targets
    notes = [
        f"{target}: rank {rank} is reduced to {min(shape[1:])}, the smaller dimension of its weights"
        for target, shape in weights.shapes.items()
        if rank > min(shape[1:])
    ]
    cache, serves = _cache(cache_dir), _serving(prints, rank, niter)
    entry, damaged = cache.find(weights, serves)
    notes += [f"{line}; decomposing again" for line in damaged]
    path = cache.path_for(weights.model, prints)
    if niter:  # a separate file from the exact SVD
        path = path.with_stem(f"{path.stem}-{niter}-{rank}")
    if entry is None:
        with cache.lock(path):
            entry, _ = cache.find(weights, serves)  # another process may have computed it in the meantime
            if entry is None:
                entry = SingularVectors(**weights.origin(), parts=_all(weights, rank, niter, progress), niter=niter)
                cache.keep(entry, path)
    return replace(entry.select(targets, rank), model=weights.model, revision=weights.revision), notes


def _all(
    weights: Weights, rank: int, niter: int | None, progress: Progress
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    parts = {}
    for target, stack in weights.stacks.items():
        layers = []
        for number, layer in enumerate(stack):
            progress(f"singular vectors of {target}", number, len(stack))
            weight = layer[:]
            if not torch.isfinite(weight).all():
                raise ModelError(f"{weights.model}: {target} of layer {number} has values that are not finite")
            layers.append(decomposed(weight, rank, niter, seed=number))
        progress(f"singular vectors of {target}", len(stack), len(stack))
        u, s, v = (torch.stack(tensors) for tensors in zip(*layers, strict=True))
        parts[target] = (u, s, v)
    return parts


def _cache(folder: str | None) -> FrozenCache[SingularVectors]:
    return FrozenCache(folder, KIND, SingularVectors.load)


def _serving(fingerprints: Mapping[str, str], rank: int, niter: int | None) -> Serves:
    """Whether an entry's header has these projections at this rank; a larger exact SVD serves too."""

    def serves(header: Mapping[str, Any]) -> bool:
        for target, fingerprint in fingerprints.items():
            need, have = min(rank, *header["shapes"][target][1:]), header["ranks"][target]
            if header["sha256"].get(target) != fingerprint or header["niter"] != niter:
                return False
            if need > have or (niter and need != have):
                return False
        return True

    return serves


class SingularMethod(Method):
    """A method that keeps singular vectors; its options have `rank`, and optionally `pissa_niter`."""

    def prepare(
        self, weights: Weights, options: Any, cache_dir: str | None, progress: Progress
    ) -> tuple[SingularVectors, Sequence[str]]:
        """The singular vectors, from the cache or newly computed."""
        return singular_vectors(weights, options.rank, _niter(options), cache_dir, progress)

    def fit(self, frozen: Any, targets: Sequence[str] | None, options: Mapping[str, Any]) -> tuple[Any, Any]:
        """Select projections, at the requested rank."""
        if not isinstance(frozen, SingularVectors):
            raise ConfigError(
                f"{self.name} needs the singular vectors of the weights, but these are from another method: omit them"
            )
        complete = self.Options(**options)
        return frozen.select(frozen.targets if targets is None else targets, complete.rank), complete

    def trained_shapes(self, frozen: SingularVectors, options: Any) -> dict[str, tuple[int, ...]]:
        """See `Method`.

        Raises:
            RuntimeError: the rank of the singular vectors differs from the options, which determine the scale.
        """
        for target, (_, s, _) in frozen.parts.items():
            if s.shape[1] != min(options.rank, *frozen.shapes[target][1:]):
                raise RuntimeError(f"rank {options.rank} with {s.shape[1]} singular vectors of {target}")
        return super().trained_shapes(frozen, options)

    def read(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> SingularVectors:
        """Read the singular vectors from an adapter's file."""
        return SingularVectors.read(tensors, header, path)

    def recall(
        self, record: Mapping[str, Any], path: Path, cache_dir: str | None, *, make: bool, trusted: bool = False
    ) -> SingularVectors:
        """The singular vectors that an adapter refers to."""
        options, targets = self.options(record), tuple(record["targets"])
        return recall(
            _cache(cache_dir),
            _serving(record["base_model"]["sha256"], options.rank, _niter(options)),
            lambda entry: entry.select(targets, options.rank),
            lambda weights: self.prepare(weights, options, cache_dir, lambda what, done, total: None)[0],
            record,
            path,
            make=make,
            trusted=trusted,
        )


def _niter(options: Any) -> int | None:
    niter: int | None = getattr(options, "pissa_niter", None)
    return niter
