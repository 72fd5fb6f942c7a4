"""The loss on clips that are not trained on: what every stage of the curriculum has to lower."""

import functools
import itertools
import os
import pathlib
from collections.abc import Iterable, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from qwenvl_jax.batch import Batch
from qwenvl_jax.config import QwenVLConfig
from qwenvl_jax.data.collate import collate
from qwenvl_jax.demo.clips import Clip
from qwenvl_jax.demo.records import conversation
from qwenvl_jax.errors import CheckpointError
from qwenvl_jax.models.qwenvl import QwenVL
from qwenvl_jax.ops.losses import chunked_cross_entropy
from qwenvl_jax.parallel.mesh import single_device_mesh
from qwenvl_jax.train.config import TrainConfig
from qwenvl_jax.train.state import ModelParts


def held_out_batch(processor, clips: Sequence[tuple[pathlib.Path, Clip]]) -> Batch:
    """The training conversations of clips, one to a row.

    Args:
      processor: a `Processor`.
      clips: files and descriptions, of split "validation".
    """
    samples = [
        processor.sample(conversation(clip, path, np.random.default_rng([clip.seed, clip.index])))
        for path, clip in clips
    ]
    # Rows of clips are short and full: the next multiple of 64 wastes little and keeps the shape the same for others.
    length = -(-max(len(sample.tokens) for sample in samples) // 64) * 64
    rows = [[sample] for sample in samples]
    return collate(rows, length=length, pixel_table=processor.pixel_table, pad_token_id=processor.pad_token_id)


def models_between_stages(config: TrainConfig, run: str | os.PathLike) -> Iterable[QwenVL]:
    """The model as a run began, and as it was at the end of each stage; one is made at a time.

    Args:
      config: of the run, with random first weights, and with `keep_checkpoints` so large that the ends of all stages
        are still there.
      run: its folder.

    Raises:
      CheckpointError: the end of a stage is not among the checkpoints.
    """
    assert isinstance(config.model, QwenVLConfig), "the first weights are random, so the model is a shape"
    parts = ModelParts(config.model, dtype=config.dtype, param_dtype=config.param_dtype, mesh=single_device_mesh())
    yield parts.merge(parts.random(config.seed))
    for end in itertools.accumulate(stage.steps for stage in config.stages):
        folder = pathlib.Path(run).absolute() / "checkpoints" / str(end) / "state"
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is missing: no checkpoint was kept there; remove {run} and train anew.")
        saved = ocp.StandardCheckpointer().restore(folder)
        yield parts.merge(saved["frozen"] | saved["state"]["params"])


def held_out_loss(model: QwenVL, batch: Batch) -> float:
    """Mean negative log likelihood, in nats, of the answers' tokens in a batch."""
    graph, weights = nnx.split(model)
    return float(_loss(graph, weights, batch))


@functools.partial(jax.jit, static_argnames="graph")
def _loss(graph, weights, batch: Batch):
    model = nnx.merge(graph, weights)
    hidden_BTH = model.hidden(batch)
    total = chunked_cross_entropy(hidden_BTH, model.text.head_weight(), batch.targets, batch.loss_weights)
    return total / batch.loss_weights.sum()
