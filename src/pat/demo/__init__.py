"""The demo: the main job on a real model and data that need no model hub.

`model` turns a quantised file from the package index into an ordinary checkpoint folder; `data` holds a small
instruction set written for this package and the prompts that show the base and the small model side by side.
"""
