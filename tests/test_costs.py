"""The costs and graph sizes in the documents are what the commands print."""

import functools
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def rows_of(page, recipe):
    """The cells of each table row of a page that begins with a recipe's name."""
    lines = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    return [cells(line) for line in lines if re.match(rf"\| {recipe}[ ,]", line)]


def cells(line):
    return [cell.strip() for cell in line.strip("| ").split("|")]


SLOW_TO_COUNT = ("mnist", "cifar10", "imagenet32", "celeba64", "celeba256")


@pytest.mark.parametrize(
    "recipe",
    ["digits", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_TO_COUNT)],
)
def test_costs_are_what_the_command_prints(recipe, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    main = runpy.run_path(str(ROOT / "benchmarks" / "cost_model.py"))["main"]
    # The command counts once for all bandwidths.
    monkeypatch.setitem(main.__globals__, "count", functools.cache(main.__globals__["count"]))
    portions = []
    links = (
        ("100", "20", (8, 24)),
        ("10", "20", (8, 24)),
        ("1", "20", (24,)),
        ("10", "1000", (8,)),
    )
    for gigabytes, latency, columns in links:
        flags = ["--teraflops", "10", "--gigabytes", gigabytes, "--latency", latency]
        monkeypatch.setattr(sys, "argv", ["cost_model.py", recipe, *flags])
        main()
        printed = [cells(line) for line in capsys.readouterr().out.splitlines() if line[:1] == "|"]
        _, _, costs, replicas, _, portion = printed
        portions += [portion[replicas.index(f"{count} GPUs")] for count in columns]
    gigaflops = rows_of("performance.md", recipe)[0][1]
    assert gigaflops == costs[3]
    if recipe != "digits":  # whose scaling is of no interest
        page_costs, page_portions = rows_of("scaling.md", recipe)
        assert page_costs[1:5] == costs[1:]
        assert [cell.replace(" ", "") for cell in page_portions[1:]] == portions


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["digits", "mnist"])
def test_graph_nodes_are_what_the_command_prints(recipe):
    command = [sys.executable, ROOT / "benchmarks" / "train_step.py", "--config", recipe]
    done = subprocess.run(
        [*command, "--steps", "0", "--batch_size", "16"], capture_output=True, text=True, check=True
    )
    nodes = json.loads(done.stdout.splitlines()[-1])["graph_nodes"]
    assert int(rows_of("performance.md", recipe)[0][3].replace(",", "")) == pytest.approx(
        nodes, 0.03
    )
