"""Optimizers, an average of weights, and a monitor of gradients.

adam_atan2.py        Adam whose step is an angle, on flat buffers; sign descent on rows of a table
adamw8bit.py         AdamW with 8-bit moments
muon.py              momentum whose update is orthogonalized
ema.py               moving average of weights
gradient_monitor.py  norms, update ratios, parameters that never had a gradient
"""
