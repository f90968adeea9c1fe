"""Captioned game-item icons, drawn from a seed: the data that the embedded model is trained on.

`spec.py` says what an icon shows, `captions.py` how one would ask for it,
`render.py` draws it with `shapes.py` and `brush.py`.
"""

from training.icons.captions import caption
from training.icons.render import render
from training.icons.spec import BACKGROUNDS, COLOURS, OBJECTS, Spec, held_out, sample_spec

__all__ = ["BACKGROUNDS", "COLOURS", "OBJECTS", "Spec", "caption", "held_out", "render", "sample_spec"]
