"""Serving: mlx_lm.server, following the champions of a registry.

`served_version` builds the model of a version on a base that stays loaded, `response_generator`
gives mlx_lm's generation loop the version of each request, `http_handler` is mlx_lm's handler with
the version in every answer, `champion_follower` watches the registry and says there what is
served, `canary_check` asks a version before it answers anybody, and `server` puts them together.
"""
