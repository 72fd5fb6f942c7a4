"""Measures `qwenvl-jax convert`: the memory it takes at its highest, and how many bytes a second go through.

    .venv/bin/python -m tools.bench_convert                            # the shapes of Qwen3-VL-235B, 4 layers
    .venv/bin/python -m tools.bench_convert --layers 4 12 --sparse --discard

For each number of layers a checkpoint of a preset's shapes is written, in bfloat16, of random bytes, the command is run
on it as a process of its own, and the checkpoint and its conversion are removed. Peak memory is the process's largest
resident set as the kernel counted it (`VmHWM`); the file cache is no part of it, for the converter maps no file.
The rate is the checkpoint's bytes over the time from the start of the process to its end, imports, checks and the wait
for the disk included; beside it stands the time that the process had a CPU for, of all its threads.

`--sparse` makes a source that is one hole: it takes no disk and reads as zeros from memory. `--discard` gives the disk
space of finished files back while the command still runs, so that a conversion larger than the disk can be measured;
neither changes what the converter does.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from qwenvl_jax.checkpoint import hf, hf_config, native, tensors
from qwenvl_jax.checkpoint.safetensors_file import DTYPES, Writer
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.presets import preset

_BLOCK = 32 << 20
# The command, which tells its peak memory as its last word. What `wait4` tells of a process counts what its parent held
# when it was forked.
_CHILD = """
import re, sys
from qwenvl_jax.cli import main
status = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
sys.exit(status)
"""
_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # of fallocate(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3_vl_235b_a22b", help="whose shapes; default: %(default)s")
    parser.add_argument("--layers", type=int, nargs="+", default=[4], help="of the decoder; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="conversions of each; default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, help="as the command takes it; default: %(default)s")
    parser.add_argument("--sparse", action="store_true", help="a source without bytes on disk")
    parser.add_argument("--discard", action="store_true", help="give the space of finished files back at once")
    parser.add_argument("--place", default=tempfile.gettempdir(), help="where; default: %(default)s")
    parser.add_argument("--into", help="where the conversion goes, if elsewhere, such as another disk")
    options = parser.parse_args()
    versions = f"Python {platform.python_version()}, NumPy {np.__version__}"
    print(f"{options.model}, {os.cpu_count()} CPUs, {platform.machine()}, {versions}, {time.strftime('%Y-%m-%d')}")
    print("| layers | GB | seconds | CPU seconds | MB/s | peak MB |\n| --- | --- | --- | --- | --- | --- |")
    for layers in options.layers:
        with contextlib.ExitStack() as stack:
            places = [options.place, options.into or options.place]
            folder, into = (
                Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-convert-", dir=place)))
                for place in places
            )
            config = _config(options.model, layers)
            size = _write(config, folder / "public", options.sparse)
            for _ in range(options.rounds):
                seconds, cpu, peak = _convert(folder / "public", into / "native", options.processes, options.discard)
                figures = (f"{size / 1e9:.2f}", f"{seconds:.1f}", f"{cpu:.1f}", f"{size / 1e6 / seconds:.0f}")
                print(f"| {layers} | {' | '.join(figures)} | {peak / 1e6:.0f} |", flush=True)
                shutil.rmtree(into / "native")


def _config(name: str, layers: int) -> QwenVLConfig:
    config = preset(name)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=layers))


def _write(config: QwenVLConfig, folder: Path, sparse: bool) -> int:
    """Writes a checkpoint of that shape; returns the bytes of its tensors."""
    folder.mkdir()
    dtype = DTYPES["BF16"]
    shapes = {name: entry.shape for entry in hf.tensor_table(config) for name in entry.names()}
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = tensors.plan_shards(sizes, tensors.MAX_SHARD_BYTES)
    files = tensors.shard_names(len(shards))
    noise = np.random.default_rng(0).integers(0, 256, _BLOCK, np.uint8).view(dtype)
    for file, shard in zip(files, shards, strict=True):
        with Writer(folder / file, [(name, dtype, shapes[name]) for name in shard], {}) as writer:
            for name in [] if sparse else shard:
                _fill(writer, name, shapes[name], noise)
            writer.finish({})
    if len(shards) > 1:
        (folder / tensors.INDEX).write_text(json.dumps(tensors.shard_index(files, shards, sizes)))
    (folder / "config.json").write_text(json.dumps(hf_config.config_to_json(config, "bfloat16")))
    return sum(sizes.values())


def _fill(writer: Writer, name: str, shape: tuple[int, ...], noise: np.ndarray) -> None:
    row = math.prod(shape[1:])
    step = max(1, len(noise) // row)
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        writer.write(name, np.resize(noise, (rows, *shape[1:])), start)


def _convert(source: Path, target: Path, processes: int, discard: bool) -> tuple[float, float, int]:
    """Runs the command; returns its seconds, those on a CPU, and the bytes of its largest resident set."""
    command = [sys.executable, "-c", _CHILD, "convert", str(source), str(target)]
    command += ["--processes", str(processes)]
    stop = threading.Event()
    watcher = threading.Thread(target=_discard, args=(target / native.FOLDER, stop))
    if discard:
        watcher.start()
    start = time.perf_counter()
    try:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        told = child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    finally:
        stop.set()
    seconds = time.perf_counter() - start
    if discard:
        watcher.join()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {child.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, int(told.split()[-1]) * 1024


def _discard(folder: Path, stop: threading.Event) -> None:
    """Makes holes of the tensors of finished files, leaving their headers and their sizes."""
    libc, done = ctypes.CDLL(None, use_errno=True), set()
    while not stop.wait(0.5):
        for path in set(folder.glob("*.safetensors")) - done:
            fd = os.open(path, os.O_RDWR)
            size, head = os.fstat(fd).st_size, 1 << 20
            if size > head:
                span = (ctypes.c_long(head), ctypes.c_long(size - head))
                libc.fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, *span)
            os.close(fd)
            done.add(path)


if __name__ == "__main__":
    main()
