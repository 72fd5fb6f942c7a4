"""How the tests run: on the CPU, seen as eight devices, with JAX strict about dtypes and ranks.

Programs are compiled quickly, see `tests.compiling`; those that `make check` compares with the reference, as users do.
"""

import os

from tests import compiling

# Before JAX is imported, here and in the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
_WANTED = {
    "xla_force_host_platform_device_count": "8",
    # Eight devices on few cores wait for one another; XLA ends the process after 40 seconds otherwise.
    "xla_cpu_collective_call_terminate_timeout_seconds": "600",
}
_GIVEN = os.environ.get("XLA_FLAGS", "")
_MISSING = {flag: value for flag, value in _WANTED.items() if flag not in _GIVEN}
os.environ["XLA_FLAGS"] = f"{_GIVEN} {compiling.flags(_MISSING)}".strip()
# And they run in one pool of as many threads: where a device waits in two exchanges at once, another is left without
# one, and all wait for it. So there are threads to spare.
os.environ.setdefault("NPROC", str(max(64, os.cpu_count() or 1)))
compiling.compile_quickly_here()
# A name that looks like a hub id must fail at once, not after a wait for a hub that no test needs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.util
import shutil
import subprocess
import tempfile

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The reference runs on torch, which `make test` installs. A Python without it runs the rest and says what it left out:
# folders in which everything needs the reference are not collected, tests marked `reference` are reported as skipped.
REFERENCE_THERE = importlib.util.find_spec("torch") is not None
NEED_REFERENCE = ["assemble", "parity"]
collect_ignore = [] if REFERENCE_THERE else NEED_REFERENCE
_ABSENT = "torch is not installed, so that nothing is compared with the reference"


def _versions() -> str:
    found = f"jax {jax.__version__}"
    if REFERENCE_THERE:
        return found
    return f"{found}; {_ABSENT}: {' and '.join(f'tests/{name}' for name in NEED_REFERENCE)} are left out"


# Processes that tests start compile the same small programs again and again: what one has compiled the others read.
if "TESTS_COMPILATION_CACHE" not in os.environ:
    _CACHE = tempfile.mkdtemp(prefix="qwenvl-jax-compiled-")
    os.environ["TESTS_COMPILATION_CACHE"] = _CACHE  # workers of the test run inherit it

    def pytest_unconfigure() -> None:
        """Removes what was compiled, once all workers are done."""
        shutil.rmtree(_CACHE, ignore_errors=True)


def pytest_report_header() -> str:
    """The version of JAX, and whether the reference is there."""
    return _versions()


def pytest_terminal_summary(terminalreporter) -> None:
    """Repeats at the end that the reference is absent."""
    if not REFERENCE_THERE:
        terminalreporter.write_line(_versions())


def pytest_collection_modifyitems(items) -> None:
    """Tests that compare with the reference report its absence."""
    if not REFERENCE_THERE:
        for item in items:
            if item.get_closest_marker("reference"):
                item.add_marker(pytest.mark.skip(reason=_ABSENT))


@pytest.fixture
def optax_promotes():
    """For tests that take optimizer steps in this process, say: optax promotes dtypes implicitly."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A whole model folder, of random weights, with tokenizer and processor; not to be changed."""
    from flax import nnx

    from qwenvl_jax.config import QwenVLConfig, RopeConfig, TextConfig, VisionConfig
    from qwenvl_jax.models.qwenvl import QwenVL
    from tests.tiny import tiny_processor_folder

    folder = tmp_path_factory.mktemp("tiny") / "model"
    ids = tiny_processor_folder(folder)
    config = QwenVLConfig(
        text=TextConfig(
            vocab_size=ids["vocab_size"],
            hidden_size=24,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            rope=RopeConfig(mrope_section=(2, 1, 1)),
        ),
        vision=VisionConfig(
            depth=2,
            hidden_size=16,
            intermediate_size=20,
            num_heads=2,
            out_hidden_size=24,
            deepstack_visual_indexes=(0,),
            num_position_embeddings=16,
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        eos_token_ids=(ids["<|im_end|>"],),
    )
    QwenVL(config, rngs=nnx.Rngs(0)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_ffmpeg():
    """Runs ffmpeg with these arguments, quietly."""
    import imageio_ffmpeg

    def run(*arguments) -> None:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-loglevel", "error", "-y", *map(str, arguments)]
        subprocess.run(command, check=True)

    return run


@pytest.fixture(scope="session")
def clip(tmp_path_factory, run_ffmpeg):
    """An MP4 of two seconds, 96x64 at 12 frames a second; not to be changed."""
    file = tmp_path_factory.mktemp("clip") / "clip.mp4"
    run_ffmpeg("-f", "lavfi", "-i", "testsrc=size=96x64:rate=12:duration=2", "-pix_fmt", "yuv420p", file)
    return file


@pytest.fixture(scope="session")
def mixed_folder(tmp_path_factory, clip):
    """The data of `tests.data.mixed.mixed_config`."""
    from tests.data.mixed import write_mixed

    folder = tmp_path_factory.mktemp("mixed")
    write_mixed(folder, clip)
    return folder
