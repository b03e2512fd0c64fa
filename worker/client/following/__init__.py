"""Follows requests: a machine without I/O decides what comes next, and a driver reads logs and listens to the feed.

The log is the truth, and the feed is only for speed. `machine.py` has the rules, `follower.py` drives one follower, and
`followers.py` has the requests, subscriptions and timers that all followers of a client share.
"""
