"""Stand-ins for commands that scripts call, such as `gcloud`: they write down how they were called."""

import os
import subprocess
from pathlib import Path


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
        """Runs a script with these variables and without those of ours that happen to be set."""
        ours = ("NAME", "ZONE", "TYPE", "IMAGE", "PROJECT")
        given = {name: value for name, value in os.environ.items() if name not in ours}
        given["PATH"] = f"{self.folder}:{given['PATH']}"
        command = [str(script), *map(str, arguments)]
        return subprocess.run(command, env=given | variables, capture_output=True, text=True, check=False, timeout=60)
