"""The losses are those that were recorded, to six digits: what is tidied changes none of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden import RUNS

FOLDER = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def losses():
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31)}  # freed memory, which saves half the time
    result = subprocess.run([sys.executable, FOLDER / "golden.py"], capture_output=True, text=True,
                            env={**os.environ, **keep})
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", RUNS)
def test_the_first_twenty_losses(name, losses):
    expected = json.loads((FOLDER / "golden.json").read_text())[name]
    assert len(expected) == 20
    assert losses[name] == pytest.approx(expected, rel=2e-6)
