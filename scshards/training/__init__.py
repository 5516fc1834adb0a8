"""Floor 8: a run, from a config and a shard set to a model that is published.

    config, settings   what a run is told; configs/ come with scshards
    plan, data         the model and task that shards and config ask for; the loaders
    trained            which parameters are, and at which share of the rate
    prepare            all that a run has before its first step
    loop               the story, top to bottom
    step               one optimizer step: micro, transfer, parallel, optim, guard, ema
    save/              checkpoints, the run's folder, what other versions wrote
    log/               metrics.jsonl, rates, trackers, profiles, summary

Read first: loop.py, then step.py.
"""
