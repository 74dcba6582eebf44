"""What a cache holds is compared with the weights before it serves, and is the same wherever it is made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import classifier, shake
from safetensors.torch import load_file, save_file

import craft_cli as craft
from craft_cli.errors import FileError, ModelError
from craft_cli.methods.adapter_folder import read_adapter
from craft_cli.methods.craft.factors import Factors
from craft_cli.methods.singular import SingularVectors, decomposed, singular_vectors
from craft_cli.models.hub import resolve
from craft_cli.models.stacks import read_weights
from craft_cli.tucker import TuckerTensor, canonical_basis, hosvd


def bogus(true: TuckerTensor) -> TuckerTensor:
    draw = torch.Generator().manual_seed(1)
    bases = [torch.linalg.qr(torch.randn(*u.shape, generator=draw))[0].contiguous() for u in true.factors]
    core = torch.randn(true.core.shape, generator=draw) * 50
    return TuckerTensor(core, (bases[0], bases[1], bases[2]), true.spectra)


def scaled(true: TuckerTensor) -> TuckerTensor:
    """What belongs to the weights, in bases that are not orthonormal."""
    return replace(true, factors=(true.factors[0] * 2, *true.factors[1:]), core=true.core * 2)


def boasting(true: TuckerTensor) -> TuckerTensor:
    layer, out, in_ = (spectrum / 3 for spectrum in true.spectra)
    return replace(true, spectra=(layer, out, in_))  # of more energy kept


@pytest.mark.parametrize("lie", [bogus, scaled, boasting])
def test_a_file_of_factors_from_elsewhere_does_not_serve(
    lie: Callable[[TuckerTensor], TuckerTensor], pico: Callable[..., Path]
) -> None:
    true = craft.decompose(str(pico()), ranks="6,5,2", cache_dir="true")
    Path("cache").mkdir()
    false = replace(true, decompositions={name: lie(each) for name, each in true.decompositions.items()})
    false.save("cache/a-downloaded.safetensors")
    with pytest.raises(ModelError, match="the weights of this model differ from those of the factors"):
        craft.attach(classifier(pico()), Factors.load("cache/a-downloaded.safetensors"))
    assert craft.decompose(str(pico()), ranks="6,5,2", cache_dir="cache").sha256() == true.sha256()


def test_a_true_one_is_compared_once(pico: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    true = craft.decompose(str(pico()), ranks="6,5,2", cache_dir="true")
    Path("cache").mkdir()
    shutil.copy(str(true.path), "cache/from-a-friend.safetensors")
    assert craft.decompose(str(pico()), ranks="6,5,2", cache_dir="cache").path == Path(
        "cache/from-a-friend.safetensors"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Factors, "belong_to", lambda *_: pytest.fail("compared again"))
        craft.decompose(str(pico()), ranks="6,5,2", cache_dir="cache")
        craft.decompose(str(pico()), ranks="6,5,2", cache_dir="true")
    false = replace(true, decompositions={name: bogus(each) for name, each in true.decompositions.items()})
    false.save("cache/from-a-friend.safetensors")
    assert craft.decompose(str(pico()), ranks="6,5,2", cache_dir="cache").sha256() == true.sha256()


@pytest.mark.parametrize("niter", [None, 4])
def test_singular_vectors_from_elsewhere_do_not_serve(niter: int | None, pico: Callable[..., Path]) -> None:
    weights = read_weights(resolve(str(pico())), ("query",))
    true, _ = singular_vectors(weights, 4, niter, "cache", lambda *_: None)
    (path,) = Path("cache").glob("*.safetensors")
    u, s, v = true.parts["query"]
    for parts in ((u, s * 2, v), (u * 2, s * 4, v * 2), (v, s, u)):
        SingularVectors(**weights.origin(), parts={"query": parts}, niter=niter).save(path)
        again, notes = singular_vectors(weights, 4, niter, "cache", lambda *_: None)
        assert again.sha256() == true.sha256()
        assert "delete it" in notes[0]


def test_the_basis_of_equal_values_follows_from_their_space() -> None:
    """Whatever rotation of it an algorithm returns, and at any rank."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(12, 12, generator=draw, dtype=torch.float64))[0]
    values = torch.tensor([9.0, 5.0, 5.0, 5.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    rotated = vectors.clone()
    for start, stop in ((1, 4), (5, 7), (7, 12)):
        turn = torch.linalg.qr(torch.randn(stop - start, stop - start, generator=draw, dtype=torch.float64))[0]
        rotated[:, start:stop] = vectors[:, start:stop] @ turn
    rotated[:, 4] *= -1
    one = canonical_basis(values, vectors, 12)
    assert torch.allclose(one, canonical_basis(values, rotated, 12), atol=1e-10)
    assert torch.allclose(one.T @ one, torch.eye(12, dtype=torch.float64), atol=1e-12)
    for rank in (1, 2, 3, 6, 9):
        assert torch.equal(canonical_basis(values, vectors, rank), one[:, :rank])


def test_repeated_layers_and_singular_weights() -> None:
    """A model whose layers were doubled, with the eigenvectors of another number of threads."""
    torch.manual_seed(0)
    layers = torch.randn(3, 8, 6).repeat(2, 1, 1)
    layers[:, 4:] = 0
    whole = hosvd(layers)
    assert torch.allclose(whole.reconstruct(), layers, atol=1e-5)
    turned = hosvd(layers + 1e-14 * torch.randn_like(layers, dtype=torch.float64).float())
    for mine, theirs in zip(whole.factors, turned.factors, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    weight = torch.randn(8, 3, dtype=torch.float64) @ torch.randn(3, 6, dtype=torch.float64)
    u, s, v = decomposed(weight, 6, None)
    assert torch.allclose(u @ s.diag() @ v.T, weight.float(), atol=1e-5)
    again = decomposed(weight.flip(0).flip(0) * (1 + 1e-15), 6, None)
    assert all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in zip((u, s, v), again, strict=True))


@pytest.mark.parametrize("method", ["craft", "lora-xs"])
def test_an_adapter_that_refers_is_made_again_but_for_rounding(method: str, pico: Callable[..., Path]) -> None:
    shutil.copytree(pico(), "base")
    adapter = craft.attach(classifier(Path("base")), method=method)
    shake(adapter)
    adapter.save("adapter", factors="reference")
    file = Path("adapter/adapter_config.json")
    record = json.loads(file.read_text())
    record["factors"]["sha256"] = "0" * 64  # as another processor's last bits would make it
    file.write_text(json.dumps(record))
    for name, parameter in craft.load(classifier(Path("base")), "adapter").change.trained().items():
        assert torch.equal(parameter, adapter.change.trained()[name])
    name = next(name for name in record["factors"]["sketch"] if "core" in name or "values" in name)
    record["factors"]["sketch"][name][0] *= 1.01
    file.write_text(json.dumps(record))
    with pytest.raises(FileError, match="gives different ones here"):
        read_adapter(Path("adapter"), make=True)


@pytest.mark.parametrize("method", ["craft", "lora-xs"])
def test_nothing_is_made_of_a_base_that_is_another_one_now(
    method: str, pico: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(pico(), "base")
    craft.attach(classifier(Path("base")), method=method).save("adapter", factors="reference")
    tensors = load_file("base/model.safetensors")
    tensors["encoder.layer.0.attention.self.query.weight"] *= 2
    save_file(tensors, "base/model.safetensors", metadata={"format": "pt"})
    before = list((tmp_path / "cache").rglob("*.safetensors"))
    for path in before:
        path.unlink()
    with pytest.raises(FileError, match="the weights of its base have changed"):
        read_adapter(Path("adapter"), make=True)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
