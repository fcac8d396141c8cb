"""How many test files run side by side."""

import os


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: most tests wait for nodes rather than compute."""
    return (os.cpu_count() or 1) + 1
