"""The number of cases per test: 25, or 3,000 with ``--hypothesis-profile thorough``.

With the latter, the counts of accepted and refused cases are printed last.
"""

from datetime import timedelta

import pytest
from harness import Counts
from hypothesis import HealthCheck, settings

COMMON = dict(
    derandomize=True,
    database=None,
    deadline=timedelta(seconds=10),
    suppress_health_check=list(HealthCheck),
)
settings.register_profile("default", max_examples=25, **COMMON)
settings.register_profile("thorough", max_examples=3000, **COMMON)
settings.load_profile("default")


TABLE = pytest.StashKey[dict[str, Counts]]()


def pytest_configure(config):
    config.stash[TABLE] = {}


def pytest_terminal_summary(terminalreporter, config):
    if settings.get_current_profile_name() == "thorough":
        for name, counts in config.stash[TABLE].items():
            terminalreporter.write_line(f"{name}: {counts}")


@pytest.fixture
def counts(request, tmp_path, monkeypatch):
    """Counts accepted and refused cases, and checks that they leave nothing behind."""
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.parent.iterdir())
    result = Counts()
    yield result
    assert set(tmp_path.parent.iterdir()) == before
    request.config.stash[TABLE][request.node.name] = result
