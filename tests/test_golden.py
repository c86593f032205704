"""The losses are those that were recorded, to six digits: what is tidied changes none of them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from golden import RUNS

FOLDER = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def losses():
    result = subprocess.run([sys.executable, FOLDER / "golden.py"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", RUNS)
def test_the_first_twenty_losses(name, losses):
    expected = json.loads((FOLDER / "golden.json").read_text())[name]
    assert len(expected) == 20
    assert losses[name] == pytest.approx(expected, rel=2e-6)
