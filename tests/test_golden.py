"""The losses are those that were recorded, to six digits: what is tidied changes none of them."""

import json
from pathlib import Path

import pytest
from forks import shared_forks
from golden import RUNS

FOLDER = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    result = shared_forks().run(FOLDER / "golden.py", cwd=tmp_path_factory.mktemp("golden"))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", RUNS)
def test_the_first_twenty_losses(name, losses):
    expected = json.loads((FOLDER / "golden.json").read_text())[name]
    assert len(expected) == 20
    assert losses[name] == pytest.approx(expected, rel=2e-6)
