"""Serving: mlx_lm.server, following the champions of a registry.

served_version.py builds the model of a version on a base that stays loaded, response_generator.py
gives mlx_lm's generation loop the version of each request, request_model.py is what a client may
ask, http_handler.py is mlx_lm's handler with the version in every answer, champion_follower.py
watches the registry and says there what is served, canary_check.py asks a version before it answers
anybody, and server.py puts them together.
"""
