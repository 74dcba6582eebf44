"""Tensors read out of safetensors files one at a time, against safetensors' own reader."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import failure
from safetensors.torch import load_file, save_file

from craft_cli.models.checkpoint import fingerprint
from craft_cli.models.shards import stored_tensors
from craft_cli.models.stacks import find_checkpoint, read_stacks

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)


def test_values_equal_those_that_safetensors_reads() -> None:
    tensors = {str(dtype): (torch.randn(5, 7) * 3).to(dtype) for dtype in DTYPES}
    tensors |= {"none": torch.empty(0, 3), "one": torch.tensor(2.5), "large": torch.randn(300, 70)}
    save_file(tensors, "file.safetensors")
    stored = stored_tensors(Path("file.safetensors"))
    for name, expected in load_file("file.safetensors").items():
        assert stored[name].shape == tuple(expected.shape)
        assert stored[name].read().dtype == expected.dtype
        assert torch.equal(stored[name].read(), expected)
        stored[name].announce()


def test_a_header_that_leaves_tensors_unaligned_is_read_as_well() -> None:
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    header += b" " * (1 + -len(header) % 4)
    Path("file.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    assert torch.equal(load_file("file.safetensors")["w"], values)
    assert torch.equal(stored_tensors(Path("file.safetensors"))["w"].read(), values)


def test_a_checkpoint_replaced_meanwhile_stays_the_one_it_was(pico: Callable[..., Path]) -> None:
    shutil.copytree(pico(), "base")
    checkpoint = find_checkpoint("base", ["query"])
    stack = read_stacks(checkpoint, checkpoint.config(), ["query"])["query"]
    before = fingerprint(stack)
    save_file({name: tensor + 1 for name, tensor in load_file("base/model.safetensors").items()}, "other")
    os.replace("other", "base/model.safetensors")
    assert fingerprint(stack) == before
    again = read_stacks(checkpoint, checkpoint.config(), ["query"])["query"]
    assert fingerprint(again) != before


def test_eight_bit_floats_are_refused_by_name(pico: Callable[..., Path]) -> None:
    shutil.copytree(pico(), "base")
    tensors = load_file("base/model.safetensors")
    name = next(name for name in tensors if name.endswith("layer.1.attention.self.query.weight"))
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, "base/model.safetensors")
    told = failure("decompose", "base")
    assert f"{name} is stored as F8_E4M3, which cannot be decomposed" in told


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system does not tell")
def test_what_was_read_and_let_go_is_no_memory_of_this_process() -> None:
    save_file({str(number): torch.ones(1024, 1024) for number in range(24)}, "file.safetensors")  # 4 MB each
    stored = stored_tensors(Path("file.safetensors"))

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssFile")).split()[1]) // 1024

    before = mapped()
    for tensor in stored.values():
        assert tensor.read().sum() == 1024 * 1024
    assert mapped() - before < 12
