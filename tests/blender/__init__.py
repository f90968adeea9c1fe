"""Tests of the Blender add-on in a real Blender, without a screen and on a virtual one."""
