"""`pytest` runs the fast suite, `pytest -m slow` the rest; neither may reach the network."""

import socket

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes rather than seconds; run with pytest -m slow")


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr and not config.option.keyword:
        config.hook.pytest_deselected(items=[i for i in items if "slow" in i.keywords])
        items[:] = [i for i in items if "slow" not in i.keywords]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small are slower on two threads, and many times slower where another program keeps a core busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    connect = socket.socket.connect

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests must not use the network (tried {address})")
        return connect(self, address)

    socket.socket.connect = local_only
    yield
    socket.socket.connect = connect
