"""Lock-in: how a model's identity consolidates over its checkpoints, and when.

Every metric is a plain function of saved activations, logits, replies or series; `docs/onset.md` defines the tests on
series: changepoints, predictions and triggers.
"""
