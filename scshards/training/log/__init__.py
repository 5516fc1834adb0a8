"""What a run says of itself: metrics.jsonl and trackers, arithmetic, profiles, its opening and summary.

Read first: metrics.py.
"""
