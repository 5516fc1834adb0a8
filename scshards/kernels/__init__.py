"""Floor 0: all compiled loops of packing and of the shard format; they release the GIL.

    tokens   rows of a matrix -> token rows            rows, plain   token rows -> members
    writing  members, labels, tar headers              members       bytes of a member -> arrays
    checksum XXH64 of a chunk                          vectors       steps of 64 bytes

Read first: members.py. Bounds are checked by the callers, before a loop begins.
"""
