"""Captioned game-item icons, drawn from a seed: the data that the embedded model is trained on.

`spec.py` says what an icon shows, `captions.py` how one would ask for it,
`render.py` draws it with `shapes.py` and `brush.py` and is the only part that needs skia; import it by its name.
"""

from training.icons.captions import caption
from training.icons.spec import BACKGROUNDS, COLOURS, OBJECTS, Spec, held_out, sample_spec

__all__ = ["BACKGROUNDS", "COLOURS", "OBJECTS", "Spec", "caption", "held_out", "sample_spec"]
