"""The ordinary training step beside that of other trainers: same model, weights, tokens and optimizer settings.

`shapes.py` says which models, `providers.py` who trains them; each provider is one script, run in fresh processes.
`compare.py` (``make compare``) prepares text and weights, runs the rounds and judges.
"""
