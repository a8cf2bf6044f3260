"""How many cases are tried: 25 of a kind, or thousands with ``--hypothesis-profile thorough``.

What became of those thousands is printed last.
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
        for name, found in config.stash[TABLE].items():
            terminalreporter.write_line(f"{name}: {found}")


@pytest.fixture
def counts(request, tmp_path, monkeypatch):
    """Counts what became of the cases, and looks for what they should not leave behind."""
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.parent.iterdir())
    found = Counts()
    yield found
    assert set(tmp_path.parent.iterdir()) == before
    request.config.stash[TABLE][request.node.name] = found
