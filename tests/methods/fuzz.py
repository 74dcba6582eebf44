"""Read many mutated adapters and files of factors, as if they came from strangers.

    python tests/methods/fuzz.py MADE SEED COUNT MERGES

MADE holds `base`, an adapter `whole`, one `small` that refers to its factors, and `factors.safetensors`. Each mutated
one is loaded, inspected and, until MERGES have been, merged: those too that no model takes, for merging has checks of
its own. Works in the current folder and prints one JSON object: how many were loaded, refused and merged, what went
wrong, the slowest, the memory.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from conftest import classifier
from safetensors.torch import load_file

import craft_cli as craft
from craft_cli.errors import CraftError
from craft_cli.files import read_header, write_tensors
from craft_cli.methods.craft.factors import Factors

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 1e308, float("nan"), float("inf"), "", "x", "../../../etc/passwd",
    "/etc/passwd", "a\nb", "\x1b[31m", "\u0000", "x" * 100_000, [], [[]], {}, {"": None}, [1, 2, 3], "float32", "save", "keys", "0" * 64,
]  # fmt: skip


def mutated_json(content: Any, draw: random.Random) -> Any:
    """One node replaced, removed, renamed or repeated."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node if isinstance(node, dict) else range(len(node))):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(content)
    node, key = draw.choice(places)
    kind = draw.randrange(4)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[str(draw.choice(ODD))[:1000]] = node.pop(key)
    elif kind == 2:
        other, where = draw.choice(places)
        if where in other if isinstance(other, dict) else where < len(other):
            node[key] = json.loads(json.dumps(other[where]))
    else:
        node[key] = draw.choice(ODD)
    return content


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    kind, place = draw.randrange(6), draw.randrange(len(data))
    if draw.random() < 0.5:
        place = min(place, draw.randrange(2000))  # headers come first
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + draw.randbytes(draw.randint(1, 9)) + data[place:]
    if kind == 2:
        return data[:place] + data[place + draw.randint(1, 9) :]
    if kind == 3:
        return draw.randbytes(8) + data[8:]
    if kind == 4:
        return draw.choice([0, 1, 7, 2**20, 2**32, 2**62, 100_000_001]).to_bytes(8, "little") + data[8:]
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(min(len(data), place + 1))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def mutated_header(data: bytes, draw: random.Random) -> bytes:
    """The safetensors header mutated as JSON, with its right length."""
    size = int.from_bytes(data[:8], "little")
    text = json.dumps(mutated_json(json.loads(data[8 : 8 + size]), draw)).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def mutated_contents(file: Path, kind: str, draw: random.Random) -> None:
    """Other tensors or another header of ours, with their right checksum."""
    tensors, header = load_file(file), read_header(file, kind)
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    change = draw.randrange(9)
    if change == 0:
        del tensors[name]
    elif change == 1:
        tensors[name] = tensor.to(
            draw.choice([torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64])
        )
    elif change == 2:
        tensors[name] = tensor.flatten()[: draw.randrange(tensor.numel() + 1)]
    elif change == 3:
        tensor.view(-1)[draw.randrange(tensor.numel())] = draw.choice([float("nan"), float("inf"), 3e38, -1e-45])
    elif change == 4:
        tensors[draw.choice(["x", "query.core", f"{name}.x", "head.score.weight", "head.", "\n"])] = tensor.clone()
    elif change == 5:
        tensors[name] = tensor.unsqueeze(0) if draw.random() < 0.5 else tensor.expand(3, *tensor.shape).contiguous()
    elif change == 6:  # consistent, but with absurdly many layers of a rank of one
        many = draw.choice([700, 5000, 400_000])
        target = draw.choice(header["targets"])
        core = f"{target}.core"
        if core in tensors:
            tensors[core] = tensors[core][:1].contiguous()
            tensors[f"{target}.factor.layer"] = torch.ones(many, 1)
            tensors[f"{target}.spectrum.layer"] = torch.ones(many)
            if f"transform.{target}.layer" in tensors:
                tensors[f"transform.{target}.layer"] = torch.ones(1, 1)
    else:
        header = mutated_json(header, draw)
    write_tensors(file, kind, tensors, {key: value for key, value in header.items() if key != "checksum"})


def mutated_alike(folder: Path, draw: random.Random) -> None:
    """Both files in the same way, with their right checksum, as someone would who wants to be believed."""
    file, config = folder / TENSORS, json.loads((folder / CONFIG).read_text())
    tensors, header = load_file(file), read_header(file, "an adapter")
    target = draw.choice(header["targets"])
    change = draw.randrange(6)
    if change == 0:
        prints = header["sha256"]
        prints = draw.choice([{}, {target: prints[target]}, prints | {target: "0" * 64}, prints | {"key": "0" * 64}])
        header["sha256"] = config["base_model"]["sha256"] = prints
    elif change == 1:
        inside = "bert.encoder.layer.0.attention.self.query.weight"
        name = draw.choice(["nonsense.weight", "x", inside, "bert.embeddings.word_embeddings.weight", "classifier"])
        config["head"].append(name)
        tensors[f"head.{name}"] = torch.ones(draw.choice([(2,), (24, 24), (64, 24), ()]))
    elif change == 2:
        config["model"]["pad_token_id"] = draw.choice([10**9, -7, -(10**9), 2**63, 63, 64])
    elif change == 3:
        config["base_model"]["model"] = draw.choice(["~nouser/x", "x" * 300, "x/" * 2000, "~", "", "..", "a/b", "demo"])
    elif change == 4:
        config["model"]["problem_type"] = draw.choice(["x", "", "regression", None])
        config["base_model"]["revision"] = draw.choice(["x" * 300, "../..", "", None])
    elif f"{target}.core" in tensors:  # factors of another shape, that fit together
        mode, dim = draw.choice([("layer", 0), ("out", 1), ("in", 2)])
        for each in header["targets"] if mode == "layer" else [target]:
            factor = tensors[f"{each}.factor.{mode}"]
            rows = factor.shape[0] + draw.choice([-1, 1, 700])
            rank = min(rows, factor.shape[1])
            tensors[f"{each}.factor.{mode}"], tensors[f"{each}.spectrum.{mode}"] = (
                torch.ones(rows, rank),
                torch.ones(rows),
            )
            tensors[f"{each}.core"] = tensors[f"{each}.core"].narrow(dim, 0, rank).contiguous()
            tensors[f"transform.{each}.{mode}"] = torch.ones(rank, rank)
    write_tensors(file, "an adapter", tensors, {key: value for key, value in header.items() if key != "checksum"})
    (folder / CONFIG).write_text(json.dumps(config))


def mutate(made: Path, case: Path, draw: random.Random) -> tuple[str, Path]:
    """A mutated copy of one of the three; what it is, and where."""
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    what = draw.choice(["whole", "small", "factors"])
    if what == "factors":
        file = Path(shutil.copy(made / "factors.safetensors", case))
        kind = "factors"
        path = file
    else:
        path = Path(shutil.copytree(made / what, case / what))
        file, kind = path / TENSORS, "an adapter"
        kinds = draw.random()
        if kinds < 0.15:
            mutated_alike(path, draw)
            return what, path
        if kinds < 0.5:
            config = path / CONFIG
            how = draw.randrange(8)
            if how == 0:
                config.write_bytes(mutated_bytes(config.read_bytes(), draw))
            elif how == 1:
                config.write_bytes(
                    draw.choice([b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe", b"", b"1" * 10_000, b"{}"])
                )
            else:
                content = json.loads(config.read_text())
                for _ in range(draw.randint(1, 2)):
                    content = mutated_json(content, draw)
                config.write_text(json.dumps(content))
            return what, path
    how = draw.randrange(3)
    if how == 0:
        file.write_bytes(mutated_bytes(file.read_bytes(), draw))
    elif how == 1:
        file.write_bytes(mutated_header(file.read_bytes(), draw))
    else:
        mutated_contents(file, kind, draw)
    return what, path


def memory() -> int:
    """Bytes of memory this process has had at most."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def read(what: str, path: Path, model: Any) -> None:
    """As a user does: onto a model, or with craft inspect."""
    if what == "factors":
        Factors.load(path)
    else:
        adapter = craft.load(model, path)
        stored = load_file(path / TENSORS)
        for name, parameter in adapter.change.trained().items():
            assert torch.equal(parameter, stored[name]), "loaded something else than the file holds"
        with torch.no_grad():
            model(input_ids=torch.tensor([[1, 5, 2]]))
        adapter.detach()
    craft.inspect(path)


def guard(work: Path, problems: list[str]) -> Callable[[], None]:
    """From the call of the result on, note what a file of tensors has no business to do."""
    active = False
    python = (str(Path(torch.__file__).parent.parent), os.path.dirname(os.__file__), str(Path(craft.__file__).parent))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not active:
            return
        if event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "pickle.find_class",
            "socket.connect",
        ):
            problems.append(f"{event} {arguments!r}"[:300])
        elif event == "exec" and not str(arguments[0].co_filename).startswith((*python, "<")):
            problems.append(f"ran code of {arguments[0].co_filename}")
        elif event == "open" and isinstance(arguments[0], str) and isinstance(arguments[2], int) and arguments[2] & 3:
            where = os.path.abspath(arguments[0])
            if not where.startswith((str(work), "/dev/", "/proc/")):
                problems.append(f"opened {where} for writing")
        elif event in ("os.remove", "os.rename", "shutil.rmtree", "os.mkdir"):
            where = os.path.abspath(str(arguments[0]))
            if not where.startswith(str(work)):
                problems.append(f"{event} {where}")

    sys.addaudithook(hook)

    def start() -> None:
        nonlocal active
        active = True

    return start


def main() -> None:
    made, seed, count, merges = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    work = Path.cwd()
    draw = random.Random(seed)
    model = classifier(made / "base")
    for what in ("whole", "small"):
        read(what, made / what, model)
        craft.merge(made / what, work / "merged", overwrite=True)
    read("factors", made / "factors.safetensors", model)
    problems: list[str] = []
    guard(work, problems)()
    before, loaded, refused, merged, slowest, largest = memory(), 0, 0, 0, 0.0, 0
    reasons: dict[str, int] = {}

    def attempt(action: Callable[[], Any], case: str) -> bool:
        """Whether it did what it should; to be refused in one line is right too, everything else a problem."""
        try:
            action()
            return True
        except CraftError as error:
            reasons[type(error).__name__] = reasons.get(type(error).__name__, 0) + 1
            if not str(error).isprintable() or len(str(error)) > 5000:
                problems.append(f"{case}: not one line: {str(error)[:300]!r}")
        except BaseException as error:
            problems.append(f"{case}: {type(error).__name__}: {str(error)[:300]!r}")
        return False

    for number in range(count):
        what, path = mutate(made, work / "case", draw)
        largest = max([largest, *(file.stat().st_size for file in (work / "case").rglob("*") if file.is_file())])
        began = time.perf_counter()
        case = f"case {number} ({what})"
        whole = attempt(partial(read, what, path, model), case)
        loaded, refused = loaded + whole, refused + (not whole)
        attached = getattr(model.base_model, "craft", None)
        if attached is not None:
            attached.detach()
        if not whole:  # what inspects need not load
            attempt(partial(craft.inspect, path), f"{case}, inspected")
        if what != "factors" and merged < merges:
            merged += attempt(partial(craft.merge, path, work / "merged", overwrite=True), f"{case}, merged")
        slowest = max(slowest, time.perf_counter() - began)
    print(json.dumps({"loaded": loaded, "refused": refused, "merged": merged, "problems": problems[:20], "slowest": slowest,
                      "memory": memory() - before, "largest": largest, "reasons": reasons}))  # fmt: skip


if __name__ == "__main__":
    main()
