"""The report: one page of HTML that shows a shard set, and runs on it, and needs no network.

    manifest, indexes --cells--> counts --shard_sets--> sections --html--> the page
    a few cells, a batch --sample-->       runs -->

Numbers are of the manifest and of columns of the indexes, which are read shard by shard; a few hundred
cells are decoded. Figures are Vega-Lite specifications (figures.py) that the page draws itself: their
library is in it. Read first: page.py.
"""
