"""Floor 2: the bytes on disk: members, tars, indexes, manifests. Pack and stream meet only here."""
