"""The classes of the class-conditional sample model: 32 single objects, one for each shape and colour."""

import random

from samples.shapes.captions import Group, Prompt, scene_for
from samples.shapes.world import COLOURS, SHAPES, Scene

CLASSES = tuple((colour, shape) for shape in SHAPES for colour in COLOURS)


def prompt_of_class(class_id: int) -> Prompt:
    """The prompt that an image of the class has to satisfy; class 7 is "a black cube"."""
    colour, shape = CLASSES[class_id]
    return Prompt("colours", (Group(shape, colour),))


def scene_of_class(rng: random.Random, class_id: int) -> Scene:
    return scene_for(rng, prompt_of_class(class_id))
