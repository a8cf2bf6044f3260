"""The versions of Python and of the packages that a training needs."""

import importlib.metadata
import platform
import re

from nvae_tf import __version__
from nvae_tf.diagnosis.findings import Finding, ok, problem

PACKAGES = ("tensorflow", "tf-keras", "tensorflow-probability", "numpy")
TESTED = re.compile(r"2\.15\.|2\.21\.")  # lines of TensorFlow


def check_versions() -> list[Finding]:
    """Whether the packages are there, in versions that go together; nothing is imported."""
    versions, findings = {}, []
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(problem(f"{name} is not installed", "pip install nvae-tf"))
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    findings.append(ok(f"nvae-tf {__version__}, Python {platform.python_version()}, {listed}"))
    flow, keras = versions.get("tensorflow", ""), versions.get("tf-keras", "")
    if flow and not TESTED.match(flow):
        findings.append(
            problem(f"tensorflow {flow} is not supported", 'pip install "tensorflow==2.21.*"')
        )
    if flow and keras and flow.split(".")[:2] != keras.split(".")[:2]:
        line = ".".join(flow.split(".")[:2])
        findings.append(
            problem(
                f"tf-keras {keras} does not go with tensorflow {flow}",
                f'pip install "tf-keras=={line}.*"',
            )
        )
    return findings
