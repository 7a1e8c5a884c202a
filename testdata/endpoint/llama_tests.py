"""What llama.cpp's server tests need of pytest beside themselves. It takes the place of their own `conftest.py`, which
begins with downloading a dozen models."""

import os
import socket

import pytest

with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    os.environ["PORT"] = str(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def servers_end_with_their_test():
    yield
    import utils

    for server in set(utils.server_instances):
        server.stop()
