"""Stand-ins for commands that scripts call, such as `gcloud`: they write down how they were called."""

import os
import subprocess
from pathlib import Path

# What the scripts for TPUs pass on, if it is set.
PASSED = (
    "LIBTPU_INIT_ARGS",
    "XLA_FLAGS",
    "JAX_COMPILATION_CACHE_DIR",
    "QWENVL_DATA",
    "WANDB_PROJECT",
    "WANDB_NAME",
    "WANDB_MODE",
)
_OURS = ("NAME", "ZONE", "TYPE", "IMAGE", "PROJECT", "WANDB_API_KEY", *PASSED)


class Commands:
    """A folder with stand-ins, which scripts run by `run` find first.

    Args:
      folder: to put them in.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, body: str = "") -> None:
        """A command that writes down its arguments and goes on with `body`, in Bash."""
        file = self.folder / name
        file.write_text(f'#!/bin/bash\necho "{name} ${{*@Q}}" >> {self.folder}/calls\n{body}\n')
        file.chmod(0o755)

    def calls(self) -> list[str]:
        """Each call on a line, its arguments quoted where they need it."""
        file = self.folder / "calls"
        return [line.replace("'", "") for line in file.read_text().splitlines()] if file.exists() else []

    def run(self, script: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
        """Runs a script in `environment`."""
        command = [str(script), *map(str, arguments)]
        given = self.environment(**variables)
        return subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=60)

    def environment(self, **variables: str) -> dict[str, str]:
        """These variables, the stand-ins first on the path, and none of ours that happens to be set."""
        given = {name: value for name, value in os.environ.items() if name not in _OURS}
        return given | {"PATH": f"{self.folder}:{given['PATH']}"} | variables
