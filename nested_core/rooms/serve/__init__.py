"""Serving: mlx_lm.server, following the champions of a registry.

follower.py watches the registry and knows which version of each name is served, served_version.py
builds the model of a version on a base that stays loaded, and canary_check.py asks it before it
answers anybody. engine.py is mlx_lm's generation thread, in which each request is answered by the
version that it began with. request_model.py is what a client may ask, request_tokens.py makes
tokens of it, stop_texts.py ends an answer, http_handler.py is mlx_lm's handler and its server,
metrics.py is what Prometheus reads, and server.py puts them together.
"""
