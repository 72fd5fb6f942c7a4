"""How tests have XLA compile for CPUs: quickly, since most programs run a few times."""

import importlib.metadata

# Without LLVM's optimizations, which take longer than running a few times saves.
QUICKLY = {"xla_backend_optimization_level": "0"}
# The older code for fusions compiles in half the time; jaxlib 0.11 ends the process at a flag that it has no more.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    QUICKLY["xla_cpu_use_fusion_emitters"] = "false"


def flags(chosen: dict[str, str]) -> str:
    """As `XLA_FLAGS` has them."""
    return " ".join(f"--{name}={value}" for name, value in chosen.items())
