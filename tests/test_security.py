"""Nothing in the package can run what a file asks for: see docs/security.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for pattern in ("*.py", "nvae_tf/**/*.py", "benchmarks/*.py", "docs/*.py")
    for path in ROOT.glob(pattern)
)
# Modules that run code on reading, and calls that run text or leave the folder that they are given.
MODULES = {"pickle", "_pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "torch"}
CALLS = {
    "eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load",
    "np.load", "os.system", "os.popen", "tar.extractall", "archive.extractall", "tempfile.mktemp",
    "tf.keras.models.load_model", "tf_keras.models.load_model", "tf.saved_model.load",
}  # fmt: skip
FORBIDDEN_VALUES = {"allow_pickle": True, "shell": True, "safe_mode": False}
# A yardstick for speed, which reads nothing.
EXCEPTIONS = {("benchmarks/torch_step.py", "torch")}


def find_problems(source: str) -> list[str]:
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            problems += [a.name for a in node.names if a.name.partition(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            problems += [node.module] if node.module.partition(".")[0] in MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            problems += [name] if name in CALLS or name.endswith(".extractall") else []
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in FORBIDDEN_VALUES and value is FORBIDDEN_VALUES[keyword.arg]:
                    problems.append(f"{keyword.arg}={value}")
            if name.endswith("get_file") and "file_hash" not in [k.arg for k in node.keywords]:
                problems.append("a download without a checksum")
    return problems


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    name = str(path.relative_to(ROOT))
    problems = [
        text
        for text in find_problems(path.read_text())
        if (name, text.partition(".")[0]) not in EXCEPTIONS
    ]
    assert not problems


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import load", "eval('1')", "yaml.load(x, Loader=Y)",
        "np.load(x, allow_pickle=True)", "run(x, shell=True)", "tar.extractall('.')",
        "tf_keras.utils.get_file('a', 'http://b')", "import torch.nn",
    ],
)  # fmt: skip
def test_what_would_be_found(source):
    assert find_problems(source)
