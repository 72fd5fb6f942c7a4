"""The classes that losses are told apart by: which data set a sample is of, and what it shows.

data set     modality     number in `Batch.classes`
(padding)                 0
captions     image        1
clips        text         2        a record of it without a video
clips        video        3
"""

import dataclasses

import numpy as np

from qwenvl_jax.data.packing import Modality, Plan

# In the order in which the classes of a data set are numbered.
_MODALITIES: tuple[Modality, ...] = ("text", "image", "video")
# What the one data set of a stage without a mixture is called.
ONLY = "data"


@dataclasses.dataclass(frozen=True)
class SampleClass:
    """A class of samples.

    Attributes:
      data: the name of the part of the mixture, "data" where there is only one without a name.
      modality: see `qwenvl_jax.data.packing.SampleFacts`.
    """

    data: str
    modality: Modality


def classes_of(plan: Plan) -> tuple[tuple[SampleClass, ...], np.ndarray]:
    """The classes that a plan's samples are of, in order, and the number, from 1, of each entry's: i32[entries]."""
    kinds = np.asarray([_MODALITIES.index(one.modality) for one in plan.facts])
    classes: list[SampleClass] = []
    numbers = np.zeros(len(plan.facts), np.int32)
    for part in plan.parts:
        entries = np.unique(part.entries)
        for kind in np.unique(kinds[entries]):
            classes.append(SampleClass(part.name or ONLY, _MODALITIES[kind]))
            numbers[entries[kinds[entries] == kind]] = len(classes)
    return tuple(classes), numbers
