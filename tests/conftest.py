import shutil

import pytest


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    """A folder for all tests of a file, removed after them: checkpoints take gigabytes in all."""
    folder = tmp_path_factory.mktemp("module")
    yield folder
    shutil.rmtree(folder)
