"""Peak memory of a training step: predicted before the first step, with settings that would fit.

`model_footprint` reads a loaded model's shapes, `peak_estimate` turns them into bytes, and
`forecast` compares these with the memory there is and chooses the layers to recompute.
"""
