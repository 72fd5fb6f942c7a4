"""Pieces of a build on Apache Beam: on this machine's cores, or on a cluster that shares the file system.

Beam hands out nothing but numbers, and what the pieces make goes through the folder of the build (`building`): so a
pipeline is small however large the corpus is, and what was made stays if it fails.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwenvl_jax.data.building import Building
from qwenvl_jax.errors import ConfigError, DataError, QwenVLError


def import_beam() -> Any:
    """Apache Beam.

    Raises:
      DataError: it is not installed.
    """
    try:
        import apache_beam
    except ImportError as error:
        raise DataError(
            f"--beam needs Apache Beam ({error}); install it with `pip install 'qwenvl_jax[beam]'`, here and on the "
            "workers."
        ) from error
    return apache_beam


class OnBeam:
    """Makes pieces in Beam's workers.

    Args:
      runner: as Beam names it, such as "DirectRunner" or "FlinkRunner".
      options: of the pipeline, each "name=value", or "name" for a switch, such as "direct_num_workers=8".

    Raises:
      ConfigError: there is no such runner or option.
      DataError: Beam is not installed.
    """

    def __init__(self, runner: str, options: Sequence[str] = ()):
        self._beam, self._runner, self._options = import_beam(), runner, [f"--{option}" for option in options]
        try:
            self._beam.runners.create_runner(runner)
        except (ValueError, ImportError, AttributeError) as error:
            raise ConfigError(f"--beam {runner}: Beam has no such runner ({_line(error)}).") from error
        self._pipeline_options()

    def __call__(self, building: Building, work: str, count: int, *arguments: Any) -> None:
        """Calls a method of a build for the pieces 0 to `count`.

        Args:
          work: name of the method.
          arguments: those before the number of the piece.

        Raises:
          DataError: a piece that cannot be made, or a pipeline that failed.
        """
        if not count:
            return
        beam = self._beam
        # A worker keeps a build open; the token tells it from another one in the same place.
        do = functools.partial(_do, str(building.folder), building.token, work, arguments)
        for path in building.folder.glob("problem-*"):
            path.unlink()
        try:
            with beam.Pipeline(runner=self._runner, options=self._pipeline_options()) as pipeline:
                _ = pipeline | beam.Create(range(count)) | beam.Reshuffle() | beam.Map(do)
        except Exception as error:  # of a cluster and its connections: whatever Beam and its runners raise
            raise DataError(
                f"--beam {self._runner}: the pipeline failed ({_line(error)}); see what Beam logged. Started again, "
                "the build keeps what is done."
            ) from error
        for path in sorted(building.folder.glob("problem-*")):
            raise DataError(path.read_text(encoding="utf-8"))

    def _pipeline_options(self) -> Any:
        options = self._beam.options.pipeline_options.PipelineOptions(self._options)
        known = options.get_all_options()
        for option in self._options:
            name = option.removeprefix("--").partition("=")[0]
            if name not in known:
                raise ConfigError(f"--beam-option {name}: Beam has no such option.")
        return options


def _do(folder: str, token: str, work: str, arguments: tuple, number: int) -> None:
    """Makes a piece in a worker; what is wrong with the data is written down, for Beam would try it again and again."""
    building = _open(folder, token)
    try:
        getattr(building, work)(*arguments, number)
    except QwenVLError as error:
        (Path(folder) / f"problem-{number:05}").write_text(str(error), encoding="utf-8")


@functools.lru_cache(maxsize=1)
def _open(folder: str, token: str) -> Building:
    """A build, opened once in each process."""
    return Building(Path(folder))


def _line(error: Exception) -> str:
    """The last line of what an error says, which in Beam's is the cause."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1][:300]}"
