"""What answering takes on a slice: prompts of one video each, and the tokens after them. The work of `plan --serve`.

Compiled are the two programs that `qwenvl_jax.generate` runs, the one that reads prompts and the one that reads a token
of each row, with caches of the size of the context. Bounds are as in `qwenvl_jax.plan.bounds`: what no answer can be
faster than, and no prediction.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from qwenvl_jax.checkpoint.hf import parameter_count
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.errors import ConfigError
from qwenvl_jax.flops import Work, step_flops
from qwenvl_jax.generate import LENGTH_STEP
from qwenvl_jax.parallel.mesh import AXES
from qwenvl_jax.parallel.rules import make_rules
from qwenvl_jax.plan.bounds import Memory, bounds, by_axis, memory
from qwenvl_jax.plan.compiling import Compiled, Phase, ServeRequest, compile_step
from qwenvl_jax.plan.mesh import divided
from qwenvl_jax.plan.plan import model_of
from qwenvl_jax.plan.topology import Topology
from qwenvl_jax.train import recipes
from qwenvl_jax.train.config import MeshConfig
from qwenvl_jax.train.config_file import load_config_file
from qwenvl_jax.train.overrides import apply_overrides

CONTEXTS = (8192, 32_768, 262_144)
# Tokens of a prompt that are not of its video, and those of one of its temporal patches: two frames of 512 by 512
# pixels, with 16 pixels a patch.
TEXT_TOKENS, FRAME_TOKENS = 256, 256
# Kinds of state that are weights; see `qwenvl_jax.plan.compiling.Compiled`.
WEIGHTS = ("decoder", "experts", "tower", "table")


@dataclasses.dataclass(frozen=True)
class Serving:
    """What is planned: answers of a model on a slice.

    Attributes:
      name: of the model.
      model: its shape.
      topology: the slice.
      mesh: how weights and rows lie on it: `tensor` splits a layer, `expert` the experts, and along `data` (and
        `expert`) each share has its own rows.
      rows: prompts that are answered at once, on the whole slice.
    """

    name: str
    model: QwenVLConfig
    topology: Topology
    mesh: MeshConfig
    rows: int

    @property
    def shares(self) -> int:
        """How many parts the rows are in."""
        return self.mesh.data * self.mesh.fsdp * self.mesh.expert


@dataclasses.dataclass(frozen=True)
class Answering:
    """Answers with a context of one size.

    Attributes:
      serving: what was planned.
      context: slots of a row's cache; prompts fill all but `LENGTH_STEP` of them.
      frames: temporal patches of a prompt's video.
      prompt, token: the compiled programs that read prompts and that read one more token of each row.
    """

    serving: Serving
    context: int
    frames: int
    prompt: Compiled
    token: Compiled

    @property
    def memories(self) -> tuple[Memory, Memory]:
        """HBM of a device while prompts are read, and while a token is."""
        reading, telling = (memory(one, self.serving.topology) for one in (self.prompt, self.token))
        if telling.temporaries is not None:
            # Weights that a token's program does not take are there all the same.
            held = sum(self.token.state.values())
            telling = dataclasses.replace(telling, arguments=held, total=held + telling.temporaries)
        return reading, telling

    @property
    def fits(self) -> bool:
        """Whether both programs fit, with room to spare."""
        return all(one.fits for one in self.memories)

    @property
    def video(self) -> Work:
        """The videos of all rows, for the tower and the mergers."""
        return _video(self.serving, self.frames)

    def facts(self) -> dict[str, Any]:
        """For `--json`: bytes of a device, seconds and FLOPs of all rows together; a video's sizes are those of one."""
        reading, telling = self.memories
        hardware = self.serving.topology.hardware
        state = self.token.state
        flops = step_flops(self.serving.model, self.video, ()).total
        # Tower, mergers and what a device has of the frames are read once at least; of a table of its own, some rows.
        seen = state["tower"] + self.prompt.state["batch"]
        return {
            "fits": self.fits,
            "hbm": {
                "limit": reading.limit,
                "weights": sum(state[kind] for kind in WEIGHTS),
                "cache": state["cache"],
                "media": self.prompt.state["batch"],
                "temporaries": {"prompt": reading.temporaries, "token": telling.temporaries},
                "total": {"prompt": reading.total, "token": telling.total},
            },
            "video": {
                "temporal_patches": self.frames,
                "tokens": self.frames * FRAME_TOKENS,
                "patches": self.video.patches // self.serving.rows,
                "flops": flops,
                "bytes": seen,
                "bounds": {
                    "compute": flops / (self.serving.topology.devices * hardware.flops),
                    "hbm": seen / hardware.hbm_bandwidth,
                },
            },
            # Bytes as the bound of HBM counts them.
            "first_token": self._phase(self.prompt, prompt_bounds(self)),
            "next_token": self._phase(self.token, token_bounds(self)),
        }

    def _phase(self, compiled: Compiled, found: dict[str, float | None]) -> dict[str, Any]:
        known, hbm = [bound for bound in found.values() if bound is not None], found["hbm"]
        return {
            "flops": compiled.flops,
            "bytes": None if hbm is None else round(hbm * self.serving.topology.hardware.hbm_bandwidth),
            "collective_bytes": by_axis(compiled.sent),
            "bounds": found,
            "seconds": max(known),
            "compile_seconds": compiled.seconds,
        }


def prompt_bounds(answering: Answering) -> dict[str, float | None]:
    """Seconds until the first token at least: the cache is written once, all else as in a training step."""
    return bounds(answering.prompt, answering.serving.topology)


def token_bounds(answering: Answering) -> dict[str, float | None]:
    """Seconds between tokens at least.

    HBM gives each weight of the decoder once, those too that a device gathers from others, but of experts as many as a
    token goes to, and the whole cache.
    """
    serving = answering.serving
    found = bounds(answering.token, serving.topology)
    state, moe = answering.token.state, serving.model.text.moe
    read = state["decoder"] * _devices_of(serving.mesh, "embed") + state["cache"]
    if moe:
        experts = state["experts"] * _devices_of(serving.mesh, "expert_embed")
        read += experts * moe.num_experts_per_tok // moe.num_experts
    return found | {"hbm": read / serving.topology.hardware.hbm_bandwidth}


def _devices_of(mesh: MeshConfig, axis: str) -> int:
    """Over how many devices the rules lay a logical axis; of weights, each of them gathers what the others have."""
    names = make_rules(mesh.rules, mesh.override)[axis] or ()
    return math.prod(getattr(mesh, name) for name in ((names,) if isinstance(names, str) else names))


def read_serving(
    source: str, overrides: Sequence[str], *, topology: str, model: str | None = None, rows: int = 0
) -> Serving:
    """What a command line asks for.

    Args:
      source: a preset, a folder or a hub id; or a config, a Python file, whose model is meant.
      overrides: settings of the mesh, such as ["--mesh.tensor", "4"]; without `--mesh.data` shares are as many as there
        are devices left, and without `--mesh.rules` each has all weights but what `tensor` and `expert` split. A
        config's mesh is that of its training, and not used.
      model: in place of the config's.
      rows: see `make_serving`.

    Raises:
      ConfigError: what is wrong with the config file, a setting, or a name; two models.
      CheckpointError: a folder that is none of a model.
    """
    odd = [name for name in overrides if name.startswith("--") and not name.startswith("--mesh.")]
    if odd:
        raise ConfigError(f"{odd[0]}: of a run's settings --serve takes those of the mesh (--mesh.tensor 4).")
    slice_ = Topology.named(topology)
    if source.endswith(".py"):
        shape, name = model_of(load_config_file(source)[0], model)
    elif model is not None:
        raise ConfigError(f"{source} and --model {model} are two models; give one, or a config (a .py file) to change.")
    else:
        shape, name = model_of(recipes.pretraining(recipes.s1()), source)
    mesh = _mesh_of(overrides, slice_) if overrides else None
    return make_serving(name, shape, slice_, mesh=mesh, rows=rows)


def _mesh_of(overrides: Sequence[str], topology: Topology) -> MeshConfig:
    base = dataclasses.replace(recipes.pretraining(recipes.s1()), mesh=MeshConfig(fsdp=1, rules="replicated"))
    mesh = apply_overrides(base, overrides).mesh
    if any(name.split("=")[0] == "--mesh.data" for name in overrides):
        return mesh
    others = math.prod(max(1, getattr(mesh, axis)) for axis in AXES if axis != "data")
    # Sizes that do not divide are told as they were given.
    return dataclasses.replace(mesh, data=topology.devices // others) if topology.devices % others == 0 else mesh


def make_serving(
    name: str, model: QwenVLConfig, topology: Topology, *, mesh: MeshConfig | None = None, rows: int = 0
) -> Serving:
    """What to plan.

    Args:
      mesh: None chooses one: `tensor` as many devices as there are heads of keys, `expert` up to 8 of the others if
        there are experts, or more until weights take half of HBM, and `data`, shares with weights and rows of their
        own, the rest.
      rows: 0 for one on each share.

    Raises:
      ConfigError: a mesh that the slice does not divide by, or rows that its shares do not.
    """
    if rows < 0:
        raise ConfigError(f"--rows {rows}: expected how many prompts are answered at once, at least 1.")
    mesh = divided(mesh, topology) if mesh else _chosen(model, topology)
    serving = Serving(name, model, topology, mesh, rows or mesh.data * mesh.fsdp * mesh.expert)
    if serving.rows % serving.shares:
        raise ConfigError(
            f"--rows {rows} cannot be shared evenly among the {serving.shares} shares of the mesh (data * fsdp * "
            f"expert); use a multiple of {serving.shares}, or another mesh."
        )
    return serving


def _chosen(model: QwenVLConfig, topology: Topology) -> MeshConfig:
    tensor = math.gcd(topology.devices, model.text.num_key_value_heads)
    rest = topology.devices // tensor
    experts = model.text.moe.num_experts if model.text.moe else 1
    expert, weights = math.gcd(rest, 8, experts), 2 * parameter_count(model)[0]
    while weights / (tensor * expert) > topology.hardware.hbm / 2 and math.gcd(rest, experts) % (2 * expert) == 0:
        expert *= 2
    return MeshConfig(data=rest // expert, fsdp=1, expert=expert, tensor=tensor, rules="replicated")


def make_answering(serving: Serving, context: int, *, quick: bool = False) -> Answering:
    """Compiles both programs for a context, each in a process of its own.

    Raises:
      ConfigError: see `frames_of`.
      QwenVLError: what the compiler has to say.
    """
    frames = frames_of(serving, context)

    def compiled(phase: Phase) -> Compiled:
        request = ServeRequest(
            model=serving.model,
            mesh=serving.mesh,
            topology=serving.topology.name,
            rows=serving.rows,
            groups=serving.shares,
            context=context,
            frames=_spread(serving, frames),
            patches=FRAME_TOKENS * serving.model.vision.spatial_merge_size**2,
            phase=phase,
            flops=_flops(serving, context, frames, phase),
        )
        return compile_step(request, quick=quick)

    return Answering(serving, context, frames, compiled("prompt"), compiled("token"))


def frames_of(serving: Serving, context: int) -> int:
    """Temporal patches of the video that fills a context.

    Raises:
      ConfigError: a context that is too small for a frame, more than the model reads, or whose prompts the devices of
        `context` cannot share.
    """
    reach = serving.model.text.max_position_embeddings
    frames = (context - LENGTH_STEP - TEXT_TOKENS) // FRAME_TOKENS
    if context % LENGTH_STEP or frames < 1 or context > reach:
        least = LENGTH_STEP + TEXT_TOKENS + FRAME_TOKENS
        raise ConfigError(
            f"a context of {context} tokens: expected a multiple of {LENGTH_STEP} from {least} to {reach}, as many as "
            f"{serving.name} reads."
        )
    prompt, parts = context - LENGTH_STEP, _devices_of(serving.mesh, "tokens")
    if prompt % parts:
        sizes = [str(n) for n in range(1, parts) if prompt % n == 0 and serving.topology.devices % n == 0]
        raise ConfigError(
            f"a context of {context} tokens: {prompt} of them are the prompt's, which the {parts} devices of "
            f"mesh.context cannot share evenly; of these they could: {', '.join(sizes)}."
        )
    return frames


def _spread(serving: Serving, frames: int) -> int:
    """Vision rows of a group, each with one temporal patch of one of its prompts."""
    mesh = serving.mesh
    multiple = mesh.context * mesh.tensor
    return -(-frames * serving.rows // serving.shares // multiple) * multiple


def _video(serving: Serving, frames: int) -> Work:
    patches = FRAME_TOKENS * serving.model.vision.spatial_merge_size**2
    return Work.of_frames(serving.model.vision, {patches: serving.rows * frames * patches})


def _flops(serving: Serving, context: int, frames: int, phase: Phase) -> int:
    text, rows = serving.model.text, serving.rows
    if phase == "token":
        return step_flops(serving.model, Work(tokens=rows, text_pairs=rows * context), ()).total
    length = context - LENGTH_STEP
    prompt = Work(tokens=rows * length, text_pairs=rows * length * (length + 1) // 2)
    # The formula has logits of all tokens; of a prompt those of the last one are made.
    unmade = 2 * rows * (length - 1) * text.hidden_size * text.vocab_size
    return step_flops(serving.model, prompt + _video(serving, frames), ()).total - unmade


def contexts_of(model: QwenVLConfig, asked: Sequence[int] = ()) -> tuple[int, ...]:
    """The contexts to plan: those asked for, else of `CONTEXTS` those that the model reads, or the longest it does."""
    reach = model.text.max_position_embeddings
    return tuple(asked) or tuple(n for n in CONTEXTS if n <= reach) or (reach // LENGTH_STEP * LENGTH_STEP,)
