"""One safetensors file: lies in its header are told from truths before a byte is believed, and slices are exact."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qwenvl_jax.checkpoint import safetensors_file
from qwenvl_jax.checkpoint.safetensors_file import MAX_HEADER_BYTES, Writer, read_header
from qwenvl_jax.errors import CheckpointError

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [5], "data_offsets": [24, 34]}
DATA = bytes(range(34))


def _write(path, header, data=DATA, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_header(tmp_path):
    tensors, metadata = read_header(_write(tmp_path / "x", {"__metadata__": {"format": "pt"}, "b": B, "a": A}))
    assert metadata == {"format": "pt"}
    assert tensors["a"].shape == (2, 3) and tensors["b"].dtype == "BF16"
    assert tensors["a"].read().tobytes() == DATA[:24] and tensors["b"].read().tobytes() == DATA[24:]
    assert tensors["b"].mapped().tobytes() == DATA[24:]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": A | {"data_offsets": [0, 20]}, "b": B}, "a, F32.2, 3., cannot take 20 bytes"),
        ({"a": A, "b": B | {"data_offsets": [20, 30]}}, "b begins at 20, the tensor before it ends at 24"),
        ({"a": A, "b": B | {"data_offsets": [26, 36]}}, "b begins at 26, the tensor before it ends at 24"),
        ({"a": A | {"shape": [2, 4], "data_offsets": [0, 32]}}, "tells of 32 bytes of tensors, the file holds 34"),
        ({"a": A, "b": B | {"shape": [500], "data_offsets": [24, 1024]}}, "tells of 1024 bytes"),
        ({"a": A, "b": B | {"shape": [2**40, 2**40], "data_offsets": [24, 34]}}, "cannot take 10 bytes"),
        ({"a": A | {"shape": [-2, -3]}}, "no counts"),
        ({"a": A | {"shape": [2.0, 3.0]}}, "no counts"),
        ({"a": A | {"shape": 6}}, "no counts"),
        ({"a": A | {"data_offsets": [0]}}, "no counts"),
        ({"a": A | {"data_offsets": [24, 0]}}, "cannot take -24 bytes"),
        ({"a": A | {"dtype": "F7"}}, "unknown type 'F7'"),
        ({"a": A | {"dtype": ["F32"]}}, "unknown type"),
        ({"a": {"dtype": "F32", "shape": [2, 3]}}, "lacks one of"),
        ({"a": [1, 2]}, "lacks one of"),
        ({"__metadata__": {"x": 1}, "a": A, "b": B}, "no object of texts"),
        (b'{"a": {"dtype": "F32"}, "a": {"dtype": "F32"}}', "'a' is there twice"),
        (b"[1, 2]", "no JSON object"),
        (b'{"a": ', "truncated or damaged"),
        (b"\xff\xfe{}", "truncated or damaged"),
        (b"[" * 100_000, "truncated or damaged"),
    ],
)
def test_lies(tmp_path, header, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read_header(_write(tmp_path / "x", header))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / "x"))


@pytest.mark.parametrize("length", [2**63, MAX_HEADER_BYTES + 1, 1000])
def test_header_longer_than_the_file(tmp_path, length):
    with pytest.raises(CheckpointError, match=f"its header of {length} bytes"):
        read_header(_write(tmp_path / "x", {"a": A, "b": B}, length=length))


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 0)])
def test_no_file_at_all(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_header(tmp_path / "x")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_header(tmp_path / "missing")


def test_a_file_that_becomes_shorter(tmp_path):
    path = _write(tmp_path / "x", {"a": A, "b": B})
    tensors, _ = read_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="it ends 1 bytes too soon"):
        tensors["b"].read()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slices(tmp_path, axis):
    """What the format's own library wrote is read in slices along any axis, and what is written so is read by it."""
    array = np.random.default_rng(0).standard_normal((4, 6, 5)).astype(ml_dtypes.bfloat16)
    save_file({"other": np.ones(3, np.float32), "x": array}, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors")[0]["x"]
    cuts = [(0, 1), (1, 3), (3, array.shape[axis])]
    specs = [("x", array.dtype, array.shape), ("y", np.dtype(np.float32), (2,)), ("one", np.dtype(np.float64), ())]
    with Writer(tmp_path / "b.safetensors", specs, {"digest": "0000"}) as writer:
        for start, stop in cuts:
            block = stored.read(start, stop, axis)
            assert np.array_equal(block, np.take(array, range(start, stop), axis))
            writer.write("x", block, start, axis)
        writer.write("y", np.array([1.5, 2.5], np.float32))
        writer.write("one", np.array([7.5]))
        writer.finish({"digest": "abcd"})
    written = load_file(tmp_path / "b.safetensors")
    assert np.array_equal(written["x"], array)
    assert written["y"].tolist() == [1.5, 2.5] and written["one"].tolist() == 7.5
    tensors, metadata = read_header(tmp_path / "b.safetensors")
    assert metadata == {"digest": "abcd"} and tensors["one"].read().tolist() == 7.5


def test_what_is_there_is_not_written_again(tmp_path, monkeypatch):
    """A file left unfinished is completed in place, whatever it holds."""
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    specs = [("a", array.dtype, array.shape)]
    path, written = tmp_path / "x", []
    with Writer(path, specs, {"plan": "one"}) as writer:
        writer.write("a", array[:, :2].copy(), 0, axis=1)
    real = safetensors_file.write_at
    monkeypatch.setattr(safetensors_file, "write_at", lambda fd, data, at: (written.append(at), real(fd, data, at)))
    with Writer(path, specs, {"plan": "two"}) as writer:
        for start in range(3):
            writer.write("a", array[:, start : start + 1].copy(), start, axis=1)
        writer.finish({"plan": "two"})
    assert np.array_equal(load_file(path)["a"], array)
    start = read_header(path)[0]["a"].offset
    assert written == [0, start + 32, start + 80, 0]  # the header, the last of each row, the header
    path.write_bytes(os.urandom(path.stat().st_size + 7))
    with Writer(path, specs, {"plan": "two"}) as writer:
        writer.write("a", array)
        writer.finish({"plan": "two"})
    assert np.array_equal(load_file(path)["a"], array)


def test_metadata_keeps_its_length(tmp_path):
    with (
        Writer(tmp_path / "x", [("a", np.dtype(np.float32), (1,))], {"digest": "0"}) as writer,
        pytest.raises(AssertionError),
    ):
        writer.finish({"digest": "0" * 30})
