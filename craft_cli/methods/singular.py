"""The leading singular vectors of every weight: what PiSSA and LoRA-XS keep of a base.

    W_l = U_l diag(s_l) V_l^T        U_l (d_out, r), s_l (r,) descending, V_l (d_in, r)

The exact SVD is computed in float64, with the signs fixed: the entry of U_l's column of largest magnitude is positive. So
smaller ranks are leading columns, and a cache entry serves them. The randomised one (Halko et al. 2009, `svd_lowrank` of
torch, as peft has it) is of one rank and number of iterations, with the seed of its layer.
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
    """Of some projections of one model.

    Attributes:
        parts: for every projection U (L, d_out, r), s (L, r), V (L, d_in, r), float32.
        niter: iterations of the randomised SVD; None of the exact one.
    """

    parts: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    niter: int | None = None

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """(L, d_out, d_in) of every projection's stack."""
        return {target: (len(u), u.shape[1], v.shape[1]) for target, (u, _, v) in self.parts.items()}

    def select(self, targets: Sequence[str], rank: int | None = None) -> SingularVectors:
        """Only these projections, at this rank or all that is kept.

        Raises:
            ConfigError: a projection or a rank is not here.
        """
        self.check_targets(targets)
        chosen = {}
        for target in targets:
            u, s, v = self.parts[target]
            r = s.shape[1] if rank is None else min(rank, *self.shapes[target][1:])
            if r > s.shape[1] or (self.niter and r != s.shape[1]):
                raise ConfigError(f"--rank {rank}: {s.shape[1]} singular vectors of {target} were prepared")
            chosen[target] = (u[:, :, :r].contiguous(), s[:, :r].contiguous(), v[:, :, :r].contiguous())
        return replace(self, parts=chosen, fingerprints={target: self.fingerprints[target] for target in targets})

    def tensors(self) -> dict[str, Tensor]:
        """By their names in a file: `TARGET.singular.out`, `.values`, `.in`."""
        return {
            f"{target}.singular.{part}": tensor
            for target, tensors in self.parts.items()
            for part, tensor in zip(_PARTS, tensors, strict=True)
        }

    def sha256(self) -> str:
        """Of all tensors, by which an adapter refers to them."""
        return checksum(self.tensors())

    def identity(self) -> dict[str, Any]:
        """For the header of a file."""
        return super().identity() | {"niter": self.niter}

    def resembles(self, target: str, layers: Sequence[Tensor], tolerance: float) -> bool:
        """Whether U_l^T W_l V_l is diag(s_l) to a relative precision; see `Frozen`."""
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
            FileError: it cannot be written.
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
            FileError: there is none, it is damaged, or it is something else.
        """
        return cls.read(*read_tensors(path, KIND), path)

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> SingularVectors:
        """Out of the tensors and the header of a file; nothing in it is believed.

        Raises:
            FileError: an entry is missing or of the wrong kind.
        """
        with entries_of(path):
            identity, parts = read_identity(header), {}
            for target in header["targets"]:
                u, s, v = (tensors[f"{target}.singular.{part}"] for part in _PARTS)
                if [t.ndim for t in (u, s, v)] != [3, 2, 3] or not (u.shape[::2] == v.shape[::2] == s.shape):
                    raise ValueError(f"the singular vectors of {target} do not fit each other")
                if not 0 < len(s) <= MOST_LAYERS or not 0 < s.shape[1] <= min(u.shape[1], v.shape[1]):
                    raise ValueError(f"{target} has {len(s)} layers and {s.shape[1]} singular values")
                if any(t.dtype != torch.float32 or not torch.isfinite(t).all() for t in (u, s, v)) or (s < 0).any():
                    raise ValueError(f"{target} holds values that are not finite float32 numbers")
                parts[target] = (u, s, v)
            niter = header["niter"]
            if not (niter is None or (type(niter) is int and niter > 0)):
                raise ValueError("its header's niter is no number")
            return cls(**identity, parts=parts, niter=niter)


@torch.no_grad()
def decomposed(weight: Tensor, rank: int, niter: int | None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, r), s (r,), V (d_in, r) of a weight (d_out, d_in), float32; r is the rank or the smaller dimension.

    Args:
        weight: of any floating-point dtype.
        rank: singular vectors wanted.
        niter: iterations of the randomised SVD; the exact one without.
        seed: of the randomised one.
    """
    rank = min(rank, *weight.shape)
    if niter is None:
        u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
        whole = canonical_basis(s, u, len(s))
        v = vh.T @ (u.T @ whole)
        found = int((s > 1e-12 * s[0]).sum())  # beyond, vectors on either side have nothing to do with each other
        u, v = _completed(whole[:, :found], len(s)), _completed(v[:, :found], len(s))
        return _as_kept(u[:, :rank], s[:rank], v[:, :rank])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight.float(), rank, niter=niter)
    flipped = canonical_signs(u)
    return _as_kept(flipped, s, v * (flipped * u).sum(0).sign())


def _completed(vectors: Tensor, count: int) -> Tensor:
    """Orthonormal vectors (n, k) and more of them (n, count), which follow from the space that is left."""
    draw = torch.Generator().manual_seed(0)
    fixed = torch.randn(len(vectors), count - vectors.shape[1], generator=draw, dtype=vectors.dtype)
    more = torch.linalg.qr(fixed - vectors @ (vectors.T @ fixed))[0]
    return torch.cat([vectors, more], 1)


def _as_kept(u: Tensor, s: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return u.float().contiguous(), s.float().contiguous(), v.float().contiguous()


def singular_vectors(
    weights: Weights, rank: int, niter: int | None, cache_dir: str | None, progress: Progress
) -> tuple[SingularVectors, Sequence[str]]:
    """The singular vectors of a model's weights, from the cache where it has them.

    Args:
        weights: of the projections.
        rank: to keep; lowered to the smaller dimension.
        niter: iterations of the randomised SVD; the exact one without.
        cache_dir: folder of the files; `~/.cache/craft` without.
        progress: called with (what, layers done, layers to do).

    Returns:
        They, and notes for the user.

    Raises:
        ModelError: a weight is not finite.
        FileError: the cache cannot be written.
    """
    prints, targets = weights.fingerprints, weights.targets
    notes = [
        f"{target}: rank {rank} lowered to {min(shape[1:])}, the smaller dimension of its weights"
        for target, shape in weights.shapes.items()
        if rank > min(shape[1:])
    ]
    cache, serves = _cache(cache_dir), _serving(prints, rank, niter)
    found, damaged = cache.find(weights, serves)
    notes += [f"{line}; decomposing again" for line in damaged]
    path = cache.path_for(weights.model, prints)
    if niter:  # beside the exact ones
        path = path.with_stem(f"{path.stem}-{niter}-{rank}")
    if found is None:
        with cache.lock(path):
            found, _ = cache.find(weights, serves)  # another process may have made it while we waited
            if found is None:
                found = SingularVectors(**weights.origin(), parts=_all(weights, rank, niter, progress), niter=niter)
                cache.keep(found, path)
    return replace(found.select(targets, rank), model=weights.model, revision=weights.revision), notes


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
                raise ModelError(f"{weights.model}: {target} of layer {number} holds values that are not finite")
            layers.append(decomposed(weight, rank, niter, seed=number))
        progress(f"singular vectors of {target}", len(stack), len(stack))
        u, s, v = (torch.stack(tensors) for tensors in zip(*layers, strict=True))
        parts[target] = (u, s, v)
    return parts


def _cache(folder: str | None) -> FrozenCache[SingularVectors]:
    return FrozenCache(folder, KIND, SingularVectors.load)


def _serving(fingerprints: Mapping[str, str], rank: int, niter: int | None) -> Serves:
    """Whether an entry's header promises these projections at this rank: of an exact SVD, larger ones serve too."""

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
    """A method that keeps singular vectors; its options have a rank, and perhaps `pissa_niter`."""

    def prepare(
        self, weights: Weights, options: Any, cache_dir: str | None, progress: Progress
    ) -> tuple[SingularVectors, Sequence[str]]:
        """The singular vectors, from the cache where it has them."""
        return singular_vectors(weights, options.rank, _niter(options), cache_dir, progress)

    def fit(self, frozen: Any, targets: Sequence[str] | None, options: Mapping[str, Any]) -> tuple[Any, Any]:
        """Some projections, at the rank asked for."""
        if not isinstance(frozen, SingularVectors):
            raise ConfigError(
                f"{self.name} needs the singular vectors of the weights, and these are another method's: leave them out"
            )
        complete = self.Options(**options)
        return frozen.select(frozen.targets if targets is None else targets, complete.rank), complete

    def trained_shapes(self, frozen: SingularVectors, options: Any) -> dict[str, tuple[int, ...]]:
        """See `Method`.

        Raises:
            RuntimeError: the singular vectors are of another rank than the options: these scale what is trained.
        """
        for target, (_, s, _) in frozen.parts.items():
            if s.shape[1] != min(options.rank, *frozen.shapes[target][1:]):
                raise RuntimeError(f"rank {options.rank} with {s.shape[1]} singular vectors of {target}")
        return super().trained_shapes(frozen, options)

    def read(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: Path) -> SingularVectors:
        """The singular vectors, out of an adapter's file."""
        return SingularVectors.read(tensors, header, path)

    def recall(
        self, record: Mapping[str, Any], path: Path, cache_dir: str | None, *, make: bool, trusted: bool = False
    ) -> SingularVectors:
        """The singular vectors that an adapter refers to."""
        options, targets = self.options(record), tuple(record["targets"])
        return recall(
            _cache(cache_dir),
            _serving(record["base_model"]["sha256"], options.rank, _niter(options)),
            lambda found: found.select(targets, options.rank),
            lambda weights: self.prepare(weights, options, cache_dir, lambda what, done, total: None)[0],
            record,
            path,
            make=make,
            trusted=trusted,
        )


def _niter(options: Any) -> int | None:
    niter: int | None = getattr(options, "pissa_niter", None)
    return niter
