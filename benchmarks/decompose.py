"""The HOSVD beside TensorLy and torch's SVD; its memory on a 7B-like checkpoint; how its time grows.

    python benchmarks/decompose.py [--parts peers,memory,growth] [--rounds 2] [--small] [--json FILE] [--plot FILE]
                                   [--layers 32] [--width 4096] [--folder DIR] [--device cuda]

peers   query, key, value and output of RoBERTa-base's shape (random weights) at ranks 64,64,8, all in float64: craft; TensorLy's
        `tucker(init="svd", n_iter_max=0)`, which is the HOSVD (iterating on would only take longer); `torch.linalg.svd` of
        the unfoldings; and, as the floor, the bare products W W^T and W^T W of every layer. The energies must agree to 1e-10.
memory  a checkpoint of 32 layers of 4096 x 4096 in bf16, query and value, in shards, is written to DIR and decomposed in
        a fresh process: the most memory above that of the imports, over one layer and the two Gram matrices. Also what reading
        costs when the files are not in the system's cache, with the next layer announced to the system and without.
growth  seconds over layers, width and rank, beside the number of operations.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tensorly
import torch
from measure import arguments, in_turn, peak, peak_memory, ratio, reset_peak, table, write
from tensorly.decomposition import tucker
from torch import Tensor

from craft_cli.files import write_json
from craft_cli.methods.craft.decomposition import decompose_weights
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.models.checkpoint import LazyMatrix
from craft_cli.models.hub import resolve
from craft_cli.models.shards import Entry, write_shards
from craft_cli.models.stacks import find_checkpoint, read_stacks, read_weights
from craft_cli.tucker import gram_matrix, hosvd, multi_mode_product, unfold

PROJECTIONS = 4
TARGETS = ("query", "value")
PRODUCTS = "bare Gram products"


# -- peers --------------------------------------------------------------------------------------------------------------


def with_craft(stack: Tensor, ranks: tuple[int, int, int]) -> float:
    """Energy kept."""
    return float(hosvd(stack, ranks, dtype=torch.float64, device=stack.device).core.square().sum())


def with_tensorly(stack: Tensor, ranks: tuple[int, int, int]) -> float:
    """Energy kept."""
    core, _ = tucker(stack.double(), rank=list(ranks), init="svd", n_iter_max=0)
    return float(core.square().sum())


def with_svd(stack: Tensor, ranks: tuple[int, int, int]) -> float:
    """Energy kept."""
    stack = stack.double()
    bases = [torch.linalg.svd(unfold(stack, mode), full_matrices=False)[0][:, :rank] for mode, rank in enumerate(ranks)]
    return float(multi_mode_product(stack, [basis.T for basis in bases]).square().sum())


def bare_products(stack: Tensor, ranks: tuple[int, int, int]) -> None:
    """Nothing but W W^T and W^T W of every layer, summed up."""
    _, d_out, d_in = stack.shape
    out, in_ = (torch.zeros(size, size, dtype=torch.float64, device=stack.device) for size in (d_out, d_in))
    for layer in stack:
        weight = layer.double()
        out.addmm_(weight, weight.T)
        in_.addmm_(weight.T, weight)


PEERS: dict[str, Callable[[Tensor, tuple[int, int, int]], float | None]] = {
    "craft": with_craft, "TensorLy tucker": with_tensorly, "torch SVD": with_svd, PRODUCTS: bare_products,
}  # fmt: skip


def peers(shape: tuple[int, int, int], rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Four projections by everyone, where `device` is."""
    tensorly.set_backend("pytorch")
    ranks = Ranks(64, 64, 8).lowered(shape).by_mode
    stacks = [torch.randn(shape, generator=torch.Generator().manual_seed(n)).to(device) for n in range(PROJECTIONS)]
    energies: dict[str, float] = {}

    def arm(name: str) -> Callable[[], None]:
        def run() -> None:
            energies[name] = sum(PEERS[name](stack, ranks) or 0.0 for stack in stacks)

        return run

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = in_turn({name: arm(name) for name in PEERS}, rounds, warm=0, wait=wait)
    for name in set(PEERS) - {PRODUCTS}:
        assert abs(energies[name] / energies["craft"] - 1) < 1e-10, (name, energies)
    return [
        {
            "by": name, "seconds": statistics.median(times), "to_craft": ratio(times, seconds["craft"]),
            "to_products": ratio(times, seconds[PRODUCTS]), "energy": energies[name] or None,
        }
        for name, times in seconds.items()
    ]  # fmt: skip


# -- memory -------------------------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, layers: int, width: int) -> None:
    """A Llama with query and value alone, random, bf16, in shards of 1 GB."""
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 32}
    write_json(folder / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes})

    def make() -> Tensor:
        return (torch.randn(width, width) * 0.02).bfloat16()

    names = [f"model.layers.{n}.self_attn.{name}.weight" for n in range(layers) for name in ("q_proj", "v_proj")]
    write_shards(folder, {name: Entry((width, width), torch.bfloat16, make) for name in names}, 10**9)


def decompose_there(folder: str, device: str) -> dict[str, Any]:
    """Decompose in this process, and what memory it took above the imports and a first small decomposition."""
    resolve(folder).config()  # imports transformers
    hosvd(torch.randn(2, 64, 64), (2, 8, 8), device=device)
    reset_peak()
    before, began = peak(), time.perf_counter()
    made = decompose_weights(
        read_weights(resolve(folder), TARGETS), Ranks(64, 64, 8), cache_dir=f"{folder}/cache", device=device, force=True
    )
    return {
        "peak_bytes": peak() - before,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if device.startswith("cuda") else None,
        "seconds": time.perf_counter() - began,
        "energy": [d.energy for d in made.factors.decompositions.values()],
    }


def memory(folder: Path, layers: int, width: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """A checkpoint larger than what may be held."""
    write_checkpoint(folder, layers, width)
    _, found = peak_memory(decompose_there, str(folder), str(device))
    layer, grams = width * width * 2, 2 * width * width * 8
    held = found["gpu_peak_bytes"] or found["peak_bytes"]
    found |= {"layers": layers, "width": width, "checkpoint_bytes": len(TARGETS) * layers * layer}
    found |= {"layer_bytes": layer, "gram_bytes": grams, "ratio": held / (layer + grams)}
    return found | {"reading": reading(folder, rounds)}


class Silent(LazyMatrix):
    """Its reading is not announced."""

    def announce(self) -> None:
        """Say nothing."""


def reading(folder: Path, rounds: int, most: int = 8) -> dict[str, Any]:
    """Seconds of one pass over some layers, by rounds: read alone, and with its Gram matrix.

    Cold is what the system forgets when it is told to; a disk of a virtual machine may have a cache of its own.
    """
    checkpoint = find_checkpoint(str(folder), TARGETS)
    stack = read_stacks(checkpoint, checkpoint.config(), TARGETS)["query"][:most]
    silent = [Silent(layer._stored, layer._view) for layer in stack]

    def cold(work: Callable[[], object]) -> float:
        os.sync()
        for file in folder.glob("*.safetensors"):
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return warm(work)

    def warm(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def read() -> None:
        for layer in stack:
            layer[:].flatten()[::1024].sum()  # a number of every page

    passes: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, seconds in (
            ("cold, read alone", cold(read)),
            ("warm, with its Gram matrix", warm(lambda: gram_matrix(stack, 1))),
            ("cold, announced", cold(lambda: gram_matrix(stack, 1))),
            ("cold, not announced", cold(lambda: gram_matrix(silent, 1))),
        ):
            passes.setdefault(name, []).append(seconds)
    return {"layers": len(stack), "passes": {name: statistics.median(seconds) for name, seconds in passes.items()}}


# -- growth -------------------------------------------------------------------------------------------------------------


def operations(shape: tuple[int, int, int], ranks: tuple[int, int, int]) -> float:
    """Additions and multiplications: lower triangles of the Gram matrices, eigenvectors (9 n^3), projection."""
    count, d_out, d_in = shape
    _, r_out, r_in = ranks
    grams = 2 * count * d_out * d_in * (count + (d_out + d_in) * 9 / 16)
    project = 2 * count * r_out * d_in * (d_out + r_in)
    return grams + 9.0 * (d_out**3 + d_in**3) + project


def growth(small: bool, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """One thing varied at a time."""
    base, rank = (4, 32, 16) if small else (12, 768, 64), (8, 16) if small else (16, 64, 256, 768)
    layers = (2, 4) if small else (4, 8, 12, 24, 48)
    widths = (16, 32) if small else (256, 512, 768, 1024, 2048)
    cases = [("layers", (n, base[1], base[1]), 64, n) for n in layers]
    cases += [("width", (base[0], n, n), 64, n) for n in widths]
    cases += [("rank", (base[0], base[1], base[1]), n, n) for n in rank]
    found = []
    for varied, shape, out_and_in, value in cases:
        ranks = Ranks(out_and_in, out_and_in, 8).lowered(shape).by_mode
        stack = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        seconds = in_turn({"craft": partial(hosvd, stack, ranks, device=device)}, rounds)["craft"]
        found.append(
            {
                "varied": varied,
                "value": value,
                "seconds": statistics.median(seconds),
                "operations": operations(shape, ranks),
            }
        )
    return found


def plot(rows: list[dict[str, Any]], file: str) -> None:
    """Seconds, and the operations scaled to them by the median of each panel."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    figure = Figure(figsize=(9, 3), layout="constrained")
    for panel, varied in zip(figure.subplots(1, 3), ("layers", "width", "rank"), strict=True):
        mine = [row for row in rows if row["varied"] == varied]
        values = [row["value"] for row in mine]
        scale = statistics.median(row["seconds"] / row["operations"] for row in mine)
        panel.loglog(values, [row["seconds"] for row in mine], "o-", label="measured")
        panel.loglog(
            values, [row["operations"] * scale for row in mine], "--", color="gray", label="operations, scaled"
        )
        panel.set_xticks(values, [str(value) for value in values])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(
            {"layers": "layers of 768 x 768", "width": "width, 12 layers", "rank": "rank OUT and IN"}[varied]
        )
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds")
    figure.axes[0].legend(frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Measure the parts asked for and print their tables."""
    given = arguments(
        __doc__,
        parts={"default": "peers,memory,growth"},
        rounds={"type": int, "default": 2},
        layers={"type": int, "default": 32},
        width={"type": int, "default": 4096},
        folder={"help": "for the checkpoint; a temporary one without"},
        device={"default": "cpu", "type": torch.device},
        plot={"metavar": "FILE"},
    )
    results: dict[str, Any] = {}
    parts = given.parts.split(",")
    if "peers" in parts:
        results["peers"] = peers((3, 24, 20) if given.small else (12, 768, 768), given.rounds, given.device)
        print("Four projections, ranks 64,64,8, float64\n")
        table(
            ("by", "seconds", "times craft's", "times the bare products"),
            [
                (row["by"], f"{row['seconds']:.2f}", f"{row['to_craft']:.2f}", f"{row['to_products']:.2f}")
                for row in results["peers"]
            ],
        )
    if "memory" in parts:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            layers, width = (3, 96) if given.small else (given.layers, given.width)
            results["memory"] = found = memory(Path(folder), layers, width, given.rounds, given.device)
        print(
            f"\n{found['checkpoint_bytes'] / 1e6:,.0f} MB of query and value decomposed in {found['seconds']:.0f} s\n"
        )
        megabytes = [f"{found[name] / 1e6:,.0f} MB" for name in ("layer_bytes", "gram_bytes", "peak_bytes")]
        table(("one layer", "two Gram matrices", "peak memory", "ratio"), [(*megabytes, f"{found['ratio']:.2f}")])
        print()
        passes = [(name, f"{value:.2f}") for name, value in found["reading"]["passes"].items()]
        table((f"one pass over {found['reading']['layers']} layers", "seconds"), passes)
    if "growth" in parts:
        results["growth"] = growth(given.small, given.rounds, given.device)
        print()
        table(
            ("varied", "value", "seconds", "operations", "10^9 a second"),
            [
                (
                    row["varied"], row["value"], f"{row['seconds']:.3f}", f"{row['operations']:.2e}",
                    f"{row['operations'] / row['seconds'] / 1e9:.1f}",
                )
                for row in results["growth"]
            ],
        )  # fmt: skip
        if given.plot:
            plot(results["growth"], given.plot)
    write(given.json, results)


if __name__ == "__main__":
    main()
