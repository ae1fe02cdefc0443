"""Peak memory of a training step: predicted before the first step, with settings that would fit.

`layers` reads a loaded model's shapes, `estimate` turns them into bytes by arithmetic, and `plan`
compares these with the memory there is and chooses the layers to recompute.
"""
