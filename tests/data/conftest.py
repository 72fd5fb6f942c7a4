"""What several tests of the data side start from; a module may have another of the same name."""

import pytest

import qwenvl_jax as qv
from tests.tiny import tiny_processor_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A processor's files."""
    folder = tmp_path_factory.mktemp("model")
    tiny_processor_folder(folder)
    return folder


@pytest.fixture(scope="module")
def processor(folder):
    """Read from `folder`."""
    return qv.Processor.from_pretrained(folder)
