"""What README shows runs as it stands, and what it links to is there."""

import re
from pathlib import Path

import pytest
from forks import shared_forks
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
CHECKS = {  # what must be true after the snippet that holds a name
    "PredictiveTransform": """
assert loss.isfinite() and 0 < metrics["squared_error"] < 100
assert model.encoder.weight.grad.abs().sum() > 0
""",
    "coefficients_from_matrices": """
assert warped.shape == images.shape and warped.dtype == torch.uint8
assert torch.equal(moved[..., 5:], images[..., :-5]) and (moved[..., :5] == 128).all()  # 5 pixels to the right
""",
    "load_features": "assert features.shape == (3, 512) and features.isfinite().all()",
}


@pytest.mark.parametrize("name", CHECKS)
def test_a_snippet_runs_as_it_stands(name, tmp_path):
    (tmp_path / "results").symlink_to(ROOT / "results")
    (tmp_path / "my_photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 50 + i)).save(tmp_path / "my_photos" / f"{i}.jpg")
    (snippet,) = [snippet for snippet in SNIPPETS if name in snippet]
    (tmp_path / "snippet.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{snippet}\n{CHECKS[name]}\n")
    result = shared_forks().run(tmp_path / "snippet.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert len(SNIPPETS) == len(CHECKS)


@pytest.mark.parametrize("page", ["README.md", "RESULTS.md", "EQUIVARIANCE.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    links = set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text))
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_the_lines_of_the_scripts_are_those_that_are_told():
    told = dict(re.findall(r"\[`(\w+\.py)`\].*\| (\d+) \|\n", (ROOT / "README.md").read_text()))
    assert len(told) == 5
    assert told == {name: str(len((ROOT / name).read_text().splitlines())) for name in told}
