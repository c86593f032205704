import contextlib
import os
import shutil
import sys

import pytest
from forks import ADDRESS, serving


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart(session):
    with contextlib.ExitStack() as stack:
        if ADDRESS not in os.environ:  # which workers have
            stack.enter_context(serving())
        session.config.add_cleanup(stack.pop_all().close)
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def memory_is_kept():
    """As every run does, for those that are parts of one."""
    import common  # here, since the process that only hands tests out would import torch, too

    common.keep_freed_memory()


@pytest.fixture(scope="module")
def module_folder(tmp_path_factory):
    """A folder for all tests of a file, removed after them: checkpoints take gigabytes in all."""
    folder = tmp_path_factory.mktemp("module")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def the_device_is_the_cpu_unless_asked_for():
    """So that the tests check the same where there is a GPU; forks.py has the same for processes of their own."""
    import common

    choose_device = common.choose_device
    with pytest.MonkeyPatch.context() as patch:  # its own, which no test undoes
        for name in {"common", "probe"} & sys.modules.keys():
            patch.setattr(sys.modules[name], "choose_device",
                          lambda device: choose_device("cpu" if device == "auto" else device))
        yield


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The test runs in an empty folder: what is decoded is cached in its data/."""
    monkeypatch.chdir(tmp_path)
