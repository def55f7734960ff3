"""Discovery: which latents carry a behaviour that fine-tuning brought in."""


def discover(config, progress=None):
    """Find causal, top-delta and random latent sets; see `lockin_fast.discovery.run.discover`."""
    from lockin_fast.discovery.run import discover as run
    from lockin_fast.progress import silent

    return run(config, progress or silent)
