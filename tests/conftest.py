"""Lets the tests import the scripts of the repository's root; quick tests and long ones."""
import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "records")]

# One thread each: the tests' processes share the cores, and the fork of a process with a pool of
# OpenMP threads waits for ever for those that it does not have.
os.environ["OMP_NUM_THREADS"] = "1"

# A job in the background ignores Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

for name, n in (("quick", 100), ("torture", 10_000)):
    settings.register_profile(name, max_examples=n, derandomize=name == "quick", deadline=None,
                              database=None, suppress_health_check=list(HealthCheck))

@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder of bytes to train on, which tests leave as it is."""
    from runs import make_data

    return make_data(tmp_path_factory.mktemp("data"))

def pytest_addoption(parser):
    parser.addoption("--torture", action="store_true", help="the long tests, too; the others with "
                     "more kills, faults and random cases (make torture)")

def pytest_configure(config):
    config.addinivalue_line("markers", "torture: takes minutes or hours, runs with --torture only")
    # In the environment, since test modules size their cases as they are imported.
    os.environ["TORTURE"] = str(int(config.getoption("--torture")))
    settings.load_profile("torture" if config.getoption("--torture") else "quick")

def pytest_collection_modifyitems(config, items):
    if not config.getoption("--torture"):
        skip = pytest.mark.skip(reason="long: make torture")
        for item in items:
            if "torture" in item.keywords:
                item.add_marker(skip)
