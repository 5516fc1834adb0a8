"""Floor 0: all compiled loops; they release the GIL.

    rows       rows of a matrix -> members             members     bytes of members <-> arrays
    cells      members -> the tokens of rows           finish      rows: masked, split, marked
    counts     members -> rows of counts              ranks       members -> genes by falling value
    own        members -> what a user's function says
    bits       draws, bits of words                    order, store: which cell when
    cache      where what was compiled is kept         vectors     in the compiler's own terms
    warm       all of them compiled beforehand

Read first: cache.py, then members.py. Compiling is what a first batch waits for, so what is rare
(logarithms, large counts, unexpressed genes) is a kernel of its own, compiled when it is met. Kernels
are plain: few functions, loops in place of slices that are assigned, no numpy functions.

Who checks what, as nothing is compiled with bounds checks but a user's function:

* Bytes, places and values from outside are the kernel's to check, before it uses them. What it finds
  ends in a status (0 is good) and the place where it stopped, of which the caller makes an error.
* Where the loop would be slower for it, another kernel of the same file checks first, and the docstring
  says which: `_is_plain` before `_spread_plain`, `measure_members` before `decode_members`.
* Room is the caller's: a docstring says how much each array has, what is not plain is computed
  in one place (`member_bound`, `tokenizer.Workspace`). Too little is a mistake of ours, which a run of
  the tests with bounds checks finds: NUMBA_BOUNDSCHECK=1, see docs/contributing.md.
"""
