"""`safelight export --quantize`: an int8 denoiser of an exported pipeline, let in by what its pictures look like.

quantize.py     from a revision to REVISION-int8: calibrates, writes, compares, installs
conditions.py   what pictures bring beside their prompts: controls, image prompts, masks
offline.py      draws pictures of a pipeline without a server
network.py      writes a network with integers
branches.py     takes control networks out of a denoiser, and puts them back
graph.py        what of a network stays float
quality.py      the bounds that its pictures must keep
judges.py       functions of the user's that label pictures
"""
