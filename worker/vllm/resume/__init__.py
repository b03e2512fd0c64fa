"""Resumes interrupted answers mid-stream: the plan, the requests, the stop strings."""
