"""Floor 5: inputs -> a shard set, and a shard set -> another one.

    pack       survey -> decide -> transpose -> scatter -> merge -> write -> manifest
    phases     these phases, as tasks that any number of processes do (executors)
    job        one pack: its lock, its marks, what is left when it stops (status reads it)
    reshard    the same, whose inputs are shard sets
    dry_run    its first phases and a sample, to say what it would make

Read first: pack.py, then phases.py. verify/ proves that a set is what its manifest says.
"""
