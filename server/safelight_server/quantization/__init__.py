"""`safelight export --quantize`: an int8 denoiser of an exported pipeline, let in by what its pictures look like.

quantize.py   from a revision to REVISION-int8: calibrates, writes, compares, installs
quality.py    the bounds that its pictures must keep
offline.py    draws pictures of a pipeline without a server
"""
