"""Audits: adapters from anywhere, judged alone against the base that each is for.

adapter_audit.py has the checks and their order, adapter_layout.py says which tensors an adapter's
configuration calls for on a base. The registry's own audit, of files that it wrote, is the core's.
"""
