"""Audits: adapters from anywhere, each judged alone against the base that it is for.

The registry's own audit, of files that it wrote, is the room housekeeping's.
"""
