"""Every command in the README and in docs/ runs, and every page and its numbers are current."""

import ast
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import nvae_tf

ROOT = Path(__file__).parent.parent
SCRIPTS = dict(  # a console script -> the module that it runs
    re.findall(r"^    (nvae-\w+) = ([\w.]+):main$", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

SMALL = (
    "--num_channels_enc 4 --num_channels_dec 4 --num_groups_per_scale 2 --num_latent_scales 1 "
    "--batch_size 200 --jit_compile off"
)
EVALUATE = "python evaluate_keras.py --checkpoint runs/digits"
BRIEF = f"{SMALL} --epochs 1 --warmup_epochs 0"

# What cannot run here at all, by how it begins; and why.
ELSEWHERE = {
    "pip install": "installs: .ci/run does it",
    "python -m venv": "installs: .ci/run does it",
    "python -m pytest": "the tests themselves",
    "ruff": ".ci/run does it",
    "mypy": ".ci/run does it",
    "check-jsonschema": ".ci/run does it",
    "mkdocs": ".ci/run does it",
    "docker": "a server",
    "mkdir -p runs": "the folder that docker mounts",
    "curl": "asks that server",
    "export": "for several machines, which tests/test_resume.py and tests/test_tuning.py start",
    "srun": "a cluster",
    "#SBATCH": "a cluster",
    "status=": "of a job of that cluster, as are the next two",
    "if [": "the same",
    "exit $status": "the same",
    "python -m tf2onnx": "another project's converter: tests/test_export_formats.py runs it",
    "python benchmarks/": "minutes: tests below and tests/test_benchmarks.py run them",
    "bash benchmarks/": "a GPU: tests/test_benchmarks.py runs it at toy size",
}

# Commands that run with other flags, by how they begin: what is put in their place, or added.
INSTEAD = {
    # Data sets that are not here: parsed, and stopped before anything is read.
    "python train_keras.py --config cifar10 --data DIR": "python train_keras.py --help",
    "python train_keras.py --config celeba64 --dataset": "python train_keras.py --help",
    "python train_keras.py --config celeba256": "python train_keras.py --help",
    "nvae-prepare images --input DIR": "nvae-prepare --help",
    # Whether that fits depends on the machine.
    "nvae-doctor --config": "nvae-doctor --help",
    # Scores with Inception's weights, which are not here.
    f"{EVALUATE} --eval_mode fid": "python evaluate_keras.py --help",
    f"{EVALUATE} --eval_mode evaluate_fid": "python evaluate_keras.py --help",
}
ADDED = {
    "python train_keras.py --config digits": BRIEF,
    "python train_keras.py --config digits_grey": BRIEF,
    "python tune_keras.py --config digits": f"{BRIEF} --max_trials 1",
    "nvae-inspect": "--seconds 0.1",
    "nvae-compress": "--limit 5",
    "python evaluate_keras.py --checkpoint runs/digits_grey": "--num_iw_samples 2",
    f"{EVALUATE} --eval_mode evaluate": "--num_iw_samples 2",
    f"{EVALUATE} --eval_mode sample": "--readjust_batches 1",
    f"{EVALUATE} --eval_mode export": "--readjust_batches 1",
    "python tests/parity.py tests/reference/cifar10_flow.npz": "--jit_compile off",
    "python examples/interpolation_video.py": "--steps 2 --stations 2",
    "python examples/start_from_trained.py": "--epochs 2 --few 2",
    "python examples/outliers.py": "--count 20 --draws 1 --fit 20 --only letters",
    "python examples/other_classes.py": "--epochs 2 --count 20 --draws 1",
    "python evaluate_keras.py --checkpoint runs/digits --eval_mode ood": "--num_iw_samples 1 "
    "--max_images 20 --fit_images 20",
}


def commands():
    """(page, command) of every shell block; prompts, comments and continued lines folded."""
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                written = re.sub(r"\s+# .*", "", line).strip()
                for command in re.split(r"\s+&&\s+", written):
                    if command and not re.match(r"#(?!SBATCH)", command) and command[0] != ".":
                        yield page.name, command


def longest(table, command):
    begins = [key for key in table if command.startswith(key)]
    return max(begins, key=len) if begins else None


def runnable():
    """Each command that runs here, with the flags that keep it short, once."""
    runs = {}
    for page, command in commands():
        if longest(ELSEWHERE, command) is None:
            short = INSTEAD.get(longest(INSTEAD, command), command)
            extra = ADDED.get(longest(ADDED, command), "") if short == command else ""
            runs.setdefault(f"{short} {extra}".strip(), (page, command))
    return runs


def run(command):
    """Runs a Python command in this process; returns its exit status."""
    program, *words = shlex.split(command)
    if program in SCRIPTS:
        words = ["-m", SCRIPTS[program], *words]
    before = sys.argv, sys.path[:]
    if words[0] == "-m":
        name, arguments = words[1], words[2:]
        start = lambda: runpy.run_module(name, run_name="__main__", alter_sys=True)  # noqa: E731
    else:
        name, arguments = words[0], words[1:]
        start = lambda: runpy.run_path(str(ROOT / name), run_name="__main__")  # noqa: E731
    sys.argv = [name, *arguments]
    sys.path.insert(0, str((ROOT / name).parent))
    try:
        start()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv, sys.path[:] = before
    return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photographs):
    """A folder to run in, with what a checkout has, and images of one's own in DIR."""
    path = tmp_path_factory.mktemp("checkout")
    for name in ("tests", "examples", "configs", "docs"):
        (path / name).symlink_to(ROOT / name)
    (path / "DIR").mkdir()
    for number, photograph in enumerate(photographs[:20]):
        Image.fromarray(photograph).save(path / "DIR" / f"{number}.png")
    return path


def test_commands_are_found():
    written = {command for _, command in commands()}
    assert {
        "python train_keras.py --config digits",
        "nvae-gallery runs/digits",
    } <= written
    assert len(written) > 30
    for command in runnable():
        program = command.split()[0]
        assert program == "python" or program in SCRIPTS, f"{command}: not runnable, not listed"
    for listed in (*ELSEWHERE, *INSTEAD, *ADDED):  # nothing stays listed that is no longer written
        assert any(command.startswith(listed) for command in written), listed


@pytest.mark.slow
def test_every_command_runs(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    todo = runnable()
    first = [
        command for command in todo if command.startswith("python train_keras.py --config digits")
    ]
    for command in [*first, *(c for c in todo if c not in first)]:
        status = run(command)
        page, written = todo[command]
        assert status == 0, f"{page}: {written}: {capfd.readouterr().err[-1000:]}"


def run_script(*words):
    """Runs a shell script of ours, with the commands of this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", *words], cwd=ROOT, env={**os.environ, "PATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_own_photographs_need_five_commands(photographs, tmp_path):
    (tmp_path / "photos").mkdir()
    for number, photograph in enumerate(photographs):
        image = Image.fromarray(photograph).resize((96, 80))
        image.save(tmp_path / "photos" / f"{number}.png")
    script = ROOT / "examples" / "own_photographs.sh"
    toy = f"{BRIEF} --batch_size 8 --num_preprocess_cells 1 --num_postprocess_cells 1 --num_nf 0"
    run_script(script, tmp_path / "photos", tmp_path / "out", *toy.split())
    assert (tmp_path / "out" / "run" / "gallery.html").is_file()
    text = script.read_text(encoding="utf-8")
    assert len(re.findall(r"^(?:python|nvae-)", text, re.MULTILINE)) == 5


@pytest.mark.slow
def test_a_release_carries_two_models(tmp_path):
    run_script(ROOT / "examples" / "release_models.sh", tmp_path, *BRIEF.split())
    for name in ("digits", "photos"):
        card = (tmp_path / f"nvae-tf-{name}.md").read_text(encoding="utf-8")
        assert "NELBO" in card and f"nvae-tf-{name}.png" in card
        assert (tmp_path / f"nvae-tf-{name}.png").is_file()
        assert (tmp_path / f"nvae-tf-{name}.html").is_file()
        with tarfile.open(tmp_path / f"nvae-tf-{name}.tar.gz") as archive:
            archive.extractall(tmp_path / "unpacked", filter="data")
        assert nvae_tf.load(tmp_path / "unpacked" / name).num_parameters > 1000


@pytest.mark.slow
def test_the_quickstarts_python_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    if not (folder / "runs" / "digits").exists():
        assert run(f"python train_keras.py --config digits {BRIEF}") == 0
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    variables = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "quickstart.md", "exec"), variables)
    assert variables["samples"].shape == (16, 32, 32, 1)
    assert variables["nelbo"].shape == (4,)


@pytest.mark.slow
def test_the_keras_pages_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "keras.md").read_text(encoding="utf-8")
    variables = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "keras.md", "exec"), variables)
    assert variables["scores"]["nelbo"] < 1000 and variables["reconstructions"].shape == (
        10,
        32,
        32,
        1,
    )
    assert variables["results"]["nelbo"] < 600
    # The page's callback for MLflow, which need not be installed.
    logged = []
    monkeypatch.setitem(
        sys.modules,
        "mlflow",
        types.SimpleNamespace(log_metrics=lambda values, step: logged.append((values, step))),
    )
    variables["MLflowCallback"]().on_epoch_end(2, {"nelbo": np.float32(1.5)})
    assert logged == [({"nelbo": 1.5}, 2)]
    for name in ("keras/samples.png", "keras/checkpoints", "own/images.json", "tuned/config.yaml"):
        assert (tmp_path / "runs" / name).exists(), name


def test_what_is_made_says_how_and_when_it_is_out_of_date():
    made = runpy.run_path(str(ROOT / "docs" / "make.py"))
    written = json.loads((ROOT / "docs" / "made.json").read_text())
    assert set(written["products"]) <= set(made["PRODUCTS"])
    assert set(written["runs"]) <= set(made["RUNS"])
    product = made["PRODUCTS"]["latents"]
    of_run = {"step": 880, "date": "2026-11-27", "sources": made["run_digest"]("digits")}
    record = {
        "command": product.command,
        "sources": made["product_digest"](product),
        "runs": {"digits": of_run},
    }

    def reason(**changes):
        records = {"products": {"latents": {**record, **changes}}, "runs": {"digits": of_run}}
        return made["reason"]("latents", records)

    assert reason() is None
    assert reason(sources="another") == "what it follows from has changed"
    assert reason(command="python x.py") == "it was made with `python x.py`"
    of_then = {"digits": {**of_run, "sources": "another"}}
    assert reason(runs=of_then) == "what the training of digits follows from has changed"
    assert reason(runs={"digits": {**of_run, "step": 44}}) == "digits was trained anew"
    assert made["reason"]("latents", {}) == "it was never recorded"


def test_every_product_has_its_caption_in_a_page():
    made = runpy.run_path(str(ROOT / "docs" / "make.py"))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    with_captions = {name for _, name, _ in made["CAPTION"].findall(text)}
    assert with_captions == set(made["PRODUCTS"]) - {"configuration"}  # whose page is all of it


def test_comments_and_docstrings_put_nothing_out_of_date(tmp_path):
    essence = runpy.run_path(str(ROOT / "docs" / "make.py"))["essence"]
    path = tmp_path / "module.py"

    def of(text):
        path.write_text(text)
        return essence(path)

    bare = of("def f(x):\n    return x + 1\n")
    assert of('"""A module."""\n\ndef f(x):  # why\n    """Adds."""\n\n    return x + 1\n') == bare
    assert of("def f(x):\n    return x + 2\n") != bare
    assert of('def f(x):\n    return "# no comment"\n') != of('def f(x):\n    return "# none"\n')


def test_captions_say_what_was_trained_before():
    caption = runpy.run_path(str(ROOT / "docs" / "make.py"))["caption"]
    run = {"command": "python train_keras.py --config digits", "seconds": 240, "step": 880}
    record = {"command": "python x.py", "seconds": 14, "version": "1.2", "date": "2026-11-27"}
    records = {
        "products": {"picture": {**record, "machine": "A, 2 CPU cores", "runs": {"digits": {}}}},
        "runs": {"digits": {**run, "machine": "B, 8 CPU cores"}},
    }
    assert caption("picture", records) == (
        "*`python x.py`, 14 s on A, 2 CPU cores; before, `python train_keras.py --config digits`, "
        "4 min for 880 steps on B, 8 CPU cores; version 1.2, 2026-11-27*"
    )


def test_the_configurations_page_is_current():
    current = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == current


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_is_python(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        ast.parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_in_the_pages_is_yaml(page):
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        assert isinstance(yaml.safe_load(block), dict)
