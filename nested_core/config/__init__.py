"""The configuration: YAML and flags, read strictly into a frozen `FineTuneConfig`.

`schema` has mlx-lm's keys and what sections ask of each other; `sections` has the sections,
`section` their base class. A key is one line there: `key_properties` says what follows from it,
`resume` what may differ on a resume, and `error_messages` how a refused configuration is explained.
`names` has the patterns of names.
"""
