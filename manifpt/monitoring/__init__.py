"""Monitoring scans: what is new in a bucket, who made it, and what has changed."""
