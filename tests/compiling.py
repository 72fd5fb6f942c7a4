"""How tests have XLA compile for CPUs: quickly, since most programs run a few times."""

import importlib.metadata
import os

# Without LLVM's optimizations, which take longer than running a few times saves.
UNOPTIMIZED = {"xla_backend_optimization_level": "0"}
# The older code for fusions compiles in half the time. Other builds of XLA end the process at a flag that they do not
# know, as jaxlib 0.11 and libtpu do at this one.
_OLDER = {"xla_cpu_use_fusion_emitters": "false"} if importlib.metadata.version("jaxlib").startswith("0.10.") else {}


def flags(chosen: dict[str, str]) -> str:
    """As `XLA_FLAGS` has them."""
    return " ".join(f"--{name}={value}" for name, value in chosen.items())


def quickly() -> str:
    """`XLA_FLAGS` of a process that compiles for CPUs alone."""
    return flags(UNOPTIMIZED | _OLDER)


def compile_quickly_here() -> None:
    """Has this process compile so; processes that it starts do without the flag that not all know.

    Unless `XLA_FLAGS` asks for optimizations. To be called before JAX is used.
    """
    given = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" in given and flags(UNOPTIMIZED) not in given:
        return
    for_all = given if flags(UNOPTIMIZED) in given else f"{given} {flags(UNOPTIMIZED)}".strip()
    os.environ["XLA_FLAGS"] = f"{for_all} {flags(_OLDER)}".strip()
    import jax

    jax.devices()  # reads the flags, once and for all
    os.environ["XLA_FLAGS"] = for_all
