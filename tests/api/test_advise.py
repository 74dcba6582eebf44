"""craft inspect as adviser: ranks proposed, runs compared, a page to read offline."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import classifier, failure, invoke, shake
from matplotlib.image import imread
from safetensors.torch import load_file

import craft_cli as craft
from craft_cli.api.predictor import load_adapted
from craft_cli.methods.base import delta
from craft_cli.methods.craft.ranks import Ranks
from craft_cli.tucker import energy_table, hosvd

Make = Callable[..., Path]


def stack(shape: tuple[int, int, int] = (4, 11, 7)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    smooth = torch.linspace(3, 0.1, shape[1])[:, None] * torch.linspace(2, 0.2, shape[2])
    return torch.randn(shape, generator=generator, dtype=torch.float64) * smooth


@pytest.mark.parametrize("block", [1, 1 << 25])
def test_the_table_holds_what_each_hosvd_keeps(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("craft_cli.tucker.energy._BLOCK_NUMBERS", block)
    w = stack()
    table = energy_table(w, [1, 3, 10, 11], [2, 5, 9])  # 9 is above the dimension 7
    assert table.norm2 == pytest.approx(float(w.square().sum()))
    for layer, (o, out), (i, in_) in itertools.product(range(1, 5), enumerate([1, 3, 10, 11]), enumerate([2, 5, 7])):
        kept = hosvd(w, (layer, out, in_), dtype=torch.float64).reconstruct()
        assert float(table.joint[layer - 1, o, i]) == pytest.approx(float(kept.square().sum() / w.square().sum()))
    whole = hosvd(w, dtype=torch.float64)
    for mode, energies in enumerate(table.by_mode):
        squares = whole.spectra[mode].square()
        assert torch.allclose(energies, squares.cumsum(0) / squares.sum())


def energies_of(base: Path) -> dict[tuple[int, int, int], tuple[int, float]]:
    """For all ranks OUT,IN,LAYERS of query and value: numbers and energy, by brute force on the weights themselves."""
    weights = load_file(base / "model.safetensors")
    stacks = [
        torch.stack([weights[f"encoder.layer.{layer}.attention.self.{name}.weight"] for layer in range(3)]).double()
        for name in ("query", "value")
    ]
    total = sum(float(w.square().sum()) for w in stacks)
    full = [hosvd(w, dtype=torch.float64) for w in stacks]
    return {
        (out, in_, layers): (
            2 * (out**2 + in_**2 + layers**2),
            sum(float(d.core[:layers, :out, :in_].square().sum()) for d in full) / total,
        )
        for out, in_, layers in itertools.product(range(1, 25), range(1, 25), range(1, 4))
    }


def test_proposals_are_the_best_of_all(pico: Make) -> None:
    base = pico()
    every = energies_of(base)
    for energy in (0.1, 0.5, 0.93, 1.0):
        advice = craft.advise(base, energy=energy)
        fewest = min(numbers for numbers, kept in every.values() if kept >= energy - 1e-9)
        numbers, kept = every[Ranks.parse(advice.ranks)]
        assert (advice.parameters, advice.energy) == (numbers, pytest.approx(kept, rel=1e-5))
        assert numbers == fewest
        assert advice.energy >= energy - 1e-9
    for budget in ("6", "300", "1k"):
        advice = craft.advise(base, budget=budget)
        most = max(kept for numbers, kept in every.values() if numbers <= int(budget.replace("k", "000")))
        assert advice.energy == pytest.approx(most, rel=1e-5)
        assert advice.parameters <= int(budget.replace("k", "000"))
    trained = craft.attach(classifier(base), craft.decompose(str(base), ranks=craft.advise(base, budget="1k").ranks))
    assert trained.count_parameters() == craft.advise(base, budget="1k").parameters


def test_the_same_figures_for_a_random_tensor_stand_beside(pico: Make) -> None:
    advice = craft.advise(pico("llama"), energy=0.5)
    query, value = advice.projections
    assert (query["shape"], value["shape"]) == ([3, 40, 24], [3, 20, 24])
    assert [row["rank"] for row in query["curve"]] == [1, 2, 3, 4, 8, 16, 24, 32, 40]
    random = hosvd(torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(8)), dtype=torch.float64)
    for row in query["curve"]:
        assert row["parameters"] == row["rank"] ** 2
        for mode, (name, size) in enumerate(zip(("layer", "out", "in"), (3, 40, 24), strict=True)):
            assert (row[name] is None) == (row["rank"] > size)
            if row["rank"] <= size:
                squares = random.spectra[mode].square()
                expected = float(squares[: row["rank"]].sum() / squares.sum())
                assert row[f"{name}_random"] == pytest.approx(expected, abs=0.05)
                assert row[name] == pytest.approx(expected, abs=0.08)  # a pico model's weights are random too
    done = invoke("inspect", str(pico("llama")), "--energy", "0.5")
    assert f"proposed    --ranks {advice.ranks}" in done.stdout.replace("  base", "base")
    assert (
        json.loads(invoke("inspect", str(pico("llama")), "--energy", "0.5", "--json").stdout)["ranks"] == advice.ranks
    )


def test_advice_on_factors_and_runs_is_on_their_base(pico: Make) -> None:
    factors = craft.decompose(str(pico()), ("key",), ranks=(4, 4, 2))
    assert factors.path is not None
    advice = craft.advise(factors.path, budget=500)
    assert [row["name"] for row in advice.projections] == ["key"]
    adapter = craft.attach(classifier(pico()), factors)
    adapter.save("adapter")
    assert craft.advise("adapter", budget=500) == advice
    assert "--energy and --budget cannot be combined; choose one" in failure(
        "inspect", "adapter", "--energy", "1", "--budget", "9"
    )
    assert "--energy: expected a number above 0 and up to 1, not 50" in failure("inspect", "adapter", "--energy", "50")
    assert "--energy: expected a number above 0" in failure("inspect", "adapter", "--energy", "0")
    assert "--budget: expected a number of parameters such as" in failure("inspect", "adapter", "--budget", "few")
    assert "--budget: 2 is below the 3 parameters of ranks 1,1,1" in failure("inspect", "adapter", "--budget", "2")


# -- runs side by side --------------------------------------------------------------------------------------------------


def three(base: Path) -> list[torch.Tensor]:
    """Adapters `a`, `b` and `c` of other ranks and targets; their dense changes of query and value, flat."""
    found = []
    for name, targets, ranks, scale in (
        ("a", ("query", "value"), (6, 5, 2), 0.3), ("b", ("query", "value"), (4, 7, 3), 0.5), ("c", ("value",), (6, 5, 2), 0.2)
    ):  # fmt: skip
        adapter = craft.attach(classifier(base), craft.decompose(str(base), targets, ranks))
        shake(adapter, scale)
        adapter.save(name)
        adapted = load_adapted(Path(name))[1]
        dense = {
            target: torch.stack([delta(chain).detach().double() for chain in adapted.change.chains(target)])
            for target in adapted.change.shapes
        }
        found.append(torch.cat([dense.get(target, torch.zeros(3, 24, 24)).flatten() for target in ("query", "value")]))
    return found


def test_cosines_are_those_of_the_dense_changes(pico: Make) -> None:
    changes = three(pico())
    compared = craft.compare(["a", "b", "c"])
    for (i, one), (j, other) in itertools.product(enumerate(changes), enumerate(changes)):
        expected = float(torch.cosine_similarity(one, other, dim=0))
        assert compared.cosine[i][j] == pytest.approx(expected, abs=1e-5)
    assert [row["change"] for row in compared.runs] == [pytest.approx(float(c.norm()), rel=1e-5) for c in changes]
    assert [row["ranks"] for row in compared.runs] == ["6,5,2", "4,7,3", "6,5,2"]
    assert [row["parameters"]["adapter"] for row in compared.runs] == [130, 148, 65]
    wide = classifier(pico("bert", hidden_size=32))
    adapter = craft.attach(wide, craft.decompose(str(pico("bert", hidden_size=32)), ranks=(4, 4, 2)))
    shake(adapter)
    adapter.save("wide")
    assert craft.compare(["a", "wide"]).cosine[0][1] is None
    assert "--compare requires at least two runs" in failure("inspect", "--compare", "a")
    assert "x is neither a run nor an adapter" in failure("inspect", "--compare", "a", "x")
    assert "several paths can be given only with --compare" in failure("inspect", "a", "b")
    assert "cannot be combined; choose one" in failure("inspect", "--compare", "a", "b", "--energy", "0.5")


def train_runs(base: Path, data_dir: Path, *ranks: str) -> tuple[str, ...]:
    """Runs at these ranks."""
    settings = (
        "--model",
        str(base),
        "--task",
        "sst2",
        "--data-dir",
        str(data_dir),
        "--use-cpu",
        "--max-steps",
        "4",
        "--metric-for-best-model",
        "loss",
        "--head-start",
        "random",
        "--head-learning-rate",
        "0.03",
    )
    for each in ranks:
        done = invoke("train", *settings, "--ranks", each, "--output-dir", f"run-{each}")
        assert done.exit_code == 0, done.stderr
    return tuple(f"run-{each}" for each in ranks)


@pytest.fixture
def one(pico: Make, data_dir: Path) -> str:
    """A run."""
    return train_runs(pico(), data_dir, "6,5,2")[0]


@pytest.mark.slow
def test_runs_side_by_side(pico: Make, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = train_runs(pico(), data_dir, "6,5,2", "4,4,2")
    content = json.loads(invoke("inspect", "--compare", *trained, "--json").stdout)
    for row in content["runs"]:
        results = json.loads(Path(row["run"], "all_results.json").read_text())
        assert {name: row[name] for name in ("metrics", "updates", "seconds", "epoch", "parameters")} == {
            name: results[name] for name in ("metrics", "updates", "seconds", "epoch", "parameters")
        }
        assert row["task"] == "sst2"
    record = Path(trained[1], "adapter/adapter_config.json")
    other = json.loads(record.read_text())
    other["training"]["metrics"] = {"f1": 0.25}
    record.write_text(json.dumps(other))
    (line,) = [line for line in invoke("inspect", "--compare", *trained).stdout.splitlines() if line.startswith("f1")]
    assert line.split() == ["f1", "0.2500"]  # the other run does not tell
    for columns in ("80", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        shown = invoke("inspect", "--compare", *trained).stdout
        for line in ("1  run-6,5,2", "2  run-4,4,2", "parameters in the adapter", "accuracy", "cosine of dW"):
            assert line in shown
        assert f"{content['cosine'][0][1]:.3f}" in shown


# -- the page -----------------------------------------------------------------------------------------------------------


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_page_needs_nothing_from_outside(one: str) -> None:
    record = Path(one, "adapter/adapter_config.json")
    content = json.loads(record.read_text())
    content["training"]["metrics"]["<script>alert(1)</script>"] = 0.5  # an adapter may come from a stranger
    record.write_text(json.dumps(content))
    done = invoke("inspect", one, "--html", "page.html")
    assert done.exit_code == 0, done.stderr
    text = Path("page.html").read_text()
    page = _Page(text)
    assert page.open == []
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object", "a"} & set(tags)
    assert all(
        str(attributes["src"]).startswith("data:image/svg+xml;base64,") for tag, attributes in page.tags if tag == "img"
    )
    assert tags.count("img") == 2  # spectra, training curve
    assert "://" not in re.sub(r'src="data:[^"]*"', "", text)
    assert "default-src 'none'" in text
    for title in ("Projections", "Spectra", "Change by layer", "Training", "Confusion", "Configuration"):
        assert f"<h2>{title}</h2>" in text
    for row in craft.inspect(one).projections:
        for value in row["change_by_layer"]:
            assert f">{value:.3g}</td>" in text
    found = craft.evaluate(one)
    assert found.confusion is not None
    cells = re.sub(r"<td[^>]*>", "<td>", text)  # the matrix is shaded
    for counts in found.confusion:
        assert "".join(f"<td>{count}</td>" for count in counts) in cells
    accuracy = f"<td>{found.metrics['accuracy']:.4f}</td><td>{found.examples}</td>"
    assert f"<tr><td>accuracy</td><td></td><td></td>{accuracy}</tr>" in text
    assert "<td>weighted avg</td>" in text
    assert f"Expected calibration error: {found.ece:.4f}" in text
    assert "<script>" not in text
    assert "task: sst2" in page.text
    again = invoke("inspect", one, "--html", "again.html")
    assert again.exit_code == 0
    assert Path("again.html").read_bytes() == Path("page.html").read_bytes()


def test_pages_of_other_things(pico: Make, tmp_path: Path) -> None:
    factors = craft.decompose(str(pico()), ranks=(6, 5, 2))
    assert invoke("inspect", str(factors.path), "--html", "factors.html").exit_code == 0
    assert "Spectra" in Path("factors.html").read_text()
    assert "Change by layer" not in Path("factors.html").read_text()
    three(pico())
    assert invoke("inspect", "a", "--html", "a.html").exit_code == 0
    assert "Not evaluated: a: no data to evaluate on" in Path("a.html").read_text()
    assert "is a model; pass a run" in failure("inspect", str(pico()), "--html", "x.html")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_shows_the_page(one: str) -> None:
    assert invoke("inspect", one, "--html", "page.html").exit_code == 0
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2600", "--enable-logging=stderr")
    done = subprocess.run(
        ["chromium", *options, "--screenshot=page.png", f"file://{Path('page.html').resolve()}"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr  # nothing refused, nothing missing
    pixels = imread("page.png")[..., :3]
    assert pixels.shape[:2] == (2600, 1100)
    rows = (pixels.min(axis=2) < 0.9).any(axis=1)  # rows with something on them
    assert rows.sum() > 500
    blue = (pixels[..., 2] - pixels[..., 0] > 0.3).sum()  # curves and the heat map
    assert blue > 2000
